"""The Hugging Face Hub, as far as huggingface_hub asks it for a model and uploads one: on this machine, in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_double"


class Repositories:
    """{"OWNER/NAME": {branch: {path: bytes}}}; whoever writes must say `TOKEN`."""

    def __init__(self):
        self.held: dict[str, dict[str, dict[str, bytes]]] = {}
        self.created: dict[str, dict] = {}
        self.asked: list[str] = []

    def commit_of(self, name: str, branch: str) -> str:
        held = self.held[name][branch]
        return hashlib.sha1(repr((branch, sorted((path, len(data), hash(data)) for path, data in held.items()))).encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Of a branch, or of the commit of one."""
        for branch, held in self.held[name].items():
            if revision in (branch, self.commit_of(name, branch)):
                return held
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Repositories

    def log_message(self, *args):
        pass

    def answer(self, status=200, value=None, data=None, **headers):
        data = json.dumps(value if value is not None else {}).encode() if data is None else data
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code, status=404):
        self.answer(status, {"error": code}, **{"X-Error-Code": code})

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.asked.append(f"{self.command} {self.path}")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.hub.held:
            return self.refuse("RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        files = self.hub.files(name, revision)
        if files is None:
            return self.refuse("RevisionNotFound")
        branch = next(b for b in self.hub.held[name] if self.hub.files(name, b) is files)
        commit = self.hub.commit_of(name, branch)
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.answer(
                value={
                    "id": name,
                    "modelId": name,
                    "sha": commit,
                    "private": False,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )
        if rest[0] == "tree":
            return self.answer(value=[{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()])
        if rest[0] == "resolve":
            data = files.get("/".join(rest[2:]))
            if data is None:
                return self.refuse("EntryNotFound")
            return self.answer(data=data, ETag=f'"{_oid(data)}"', **{"X-Repo-Commit": commit, "Accept-Ranges": "none"})
        return self.refuse("NotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"POST {self.path}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self.answer(value={"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse("Unauthorized", 401)
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            url = f"http://{self.headers['Host']}/{name}"
            if name in self.hub.held:
                return self.answer(409, {"url": url})
            self.hub.held[name], self.hub.created[name] = {"main": {}}, asked
            return self.answer(value={"url": url})
        name, what, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "branch":
            if branch in self.hub.held[name]:
                return self.refuse("Conflict", 409)
            self.hub.held[name][branch] = dict(self.hub.held[name]["main"])
            return self.answer()
        if what == "preupload":
            asked = json.loads(body)["files"]
            return self.answer(value={"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.held[name][branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.hub.commit_of(name, branch)
            return self.answer(
                value={"commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "success": True}
            )
        return self.refuse("NotFound")


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running():
    """(its address, its `Repositories`)."""
    hub = Repositories()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
