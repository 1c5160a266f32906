"""Chromium without a window, asked by the DevTools protocol over a pair of pipes: the standard library is all it takes."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The first browser on PATH that speaks the protocol."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in one browser. ``errors``: what its console and its policy complained of. ``requests``: addresses that it asked for."""

    def __init__(self, program: str, profile: Path):
        (their_in, to_browser), (from_browser, their_out) = os.pipe(), os.pipe()
        # above 4, so that neither of the two that the browser wants is taken from under the other
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (their_in, their_out)]

        def hand_over() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"]
        flags += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([program, *flags, "about:blank"], close_fds=False, preexec_fn=hand_over, **quiet)
        for end in (their_in, their_out, *high):
            os.close(end)
        self._write, self._read, self._buffer, self._number = to_browser, from_browser, b"", 0
        self.errors, self.requests, self._events = [], [], []
        target = next(each for each in self._call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM", "CSS"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """A command to the page."""
        return self._call(method, self._session, **parameters)

    def _call(self, method: str, session: str | None = None, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _next(self, seconds: float = 60) -> dict:
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, f"the browser says nothing for {seconds} s"
            data = os.read(self._read, 1 << 20)
            assert data, f"the browser has ended ({self._process.poll()})"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(
                parameters["exceptionDetails"].get("exception", parameters["exceptionDetails"]).get("description", "an exception")
            )
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        self._events.append(method)

    def open(self, page: Path, hash_: str = "") -> None:
        """Loads the file afresh and waits until it is there."""
        self.call("Page.navigate", url="about:blank")
        self.errors.clear()
        self.requests.clear()
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri() + hash_)
        while self.run("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.05)

    def run(self, expression: str):
        """Value of JavaScript; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def reload_without_scripts(self) -> None:
        """The page as it is where scripts do not run; ours, by `run`, do not either until `with_scripts`."""
        self.call("Emulation.setScriptExecutionDisabled", value=True)
        self._events.clear()
        self.call("Page.reload")
        while "Page.loadEventFired" not in self._events:
            self._note(self._next())

    def with_scripts(self) -> None:
        """The end of `reload_without_scripts`."""
        self.call("Emulation.setScriptExecutionDisabled", value=False)

    def drawn(self, selector: str) -> list[bool]:
        """Whether each element has a place on the page; no script is needed for it."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        nodes = self.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
        return [bool(self.call("DOM.getContentQuads", nodeId=node)["quads"]) if self._boxed(node) else False for node in nodes]

    def _boxed(self, node: int) -> bool:
        style = self.call("CSS.getComputedStyleForNode", nodeId=node)["computedStyle"]
        return next(each["value"] for each in style if each["name"] == "display") != "none"

    def press(self, key: str, code: str | None = None, text: str = "") -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code or key, windowsVirtualKeyCode=codes.get(key, 0), **extra)

    def media(self, **features: str) -> None:
        """media(prefers_color_scheme="dark")"""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def window(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path

    def close(self) -> None:
        os.close(self._write)  # the browser ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._read)
