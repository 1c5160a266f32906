"""Snapshots on the disk: folders that are whole or are none, and are known to be what was written.

    RUN/snapshots/step-00000120/
        weights.safetensors  optimizer.safetensors  random.safetensors  best.safetensors  state.json
        manifest.json        size and SHA-256 of each, written last

A snapshot is written into a folder aside, brought to the disk, and renamed. A kill at any moment leaves the earlier ones as they were and a
folder that nobody takes for a snapshot; the next run sweeps it away. Nothing is unpickled: tensors are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidc.checkpoint.header import load_safetensors
from fastidc.errors import FastidcError
from fastidc.files import LARGEST_JSON, parse_json, read_plain, sync_folder

FOLDER = "snapshots"
MANIFEST = "manifest.json"
STATE = "state.json"
BEST = "best.safetensors"  # the weights of the best epoch so far, as RUN/model.safetensors had them
FORMAT, VERSION = "fastidc snapshot", 1
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".snapshot-"
_OLD = f"{_ASIDE}old-"  # and the name of the snapshot that one of the same step is about to replace

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """What `read` verified. ``tensors``: file -> name -> tensor, on the CPU; ``state``: what `write` was given."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def beside(folder: Path, file: Path) -> Path:
    """``file`` as it is now under a name in ``folder``, for `write` to take: the same bytes on the disk where it can be, or a copy. Whoever replaces
    ``file`` later leaves this one."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{_ASIDE}best-{secrets.token_hex(4)}"
    try:
        os.link(file, path)
    except OSError:  # a file system without links
        shutil.copyfile(file, path)
    return path


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], best: Path | None = None) -> Path:
    """Writes the snapshot of ``step`` into ``folder`` (RUN/snapshots); returns its path. tensors: name of a file without its ending -> its tensors,
    on the CPU, contiguous, none a view of another. best: a file of `beside`, which moves into the snapshot. One of the same step is replaced.
    FastidcError where the disk refuses; nothing is then left."""
    path = folder / name_of(step)
    aside = folder / f"{_ASIDE}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(exist_ok=True)  # not its parent: a run folder that was taken away is not made again
        aside.mkdir()
        for name, values in tensors.items():
            _save_tensors(aside / f"{name}.safetensors", values)
        if best is not None:
            best.rename(aside / BEST)
        _save_bytes(aside / STATE, _json(state))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(aside.iterdir())}
        _save_bytes(aside / MANIFEST, _json({"format": FORMAT, "version": VERSION, "step": step, "files": files}))
        sync_folder(aside)
        shutil.rmtree(folder / f"{_OLD}{path.name}", ignore_errors=True)
        if path.exists():  # see `_recover`
            path.rename(folder / f"{_OLD}{path.name}")
        aside.rename(path)
        sync_folder(folder)
    except OSError as error:
        raise FastidcError(
            f"{path} cannot be written ({error.strerror or error}); what was saved before it is whole: make room, or give another --out."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if best is not None:
            best.unlink(missing_ok=True)
    shutil.rmtree(folder / f"{_OLD}{path.name}", ignore_errors=True)
    return path


def read(path: Path) -> Snapshot:
    """The snapshot in ``path``, after every file's size and SHA-256 were compared with the manifest's. FastidcError names what does not fit."""
    manifest = _read_json(path / MANIFEST, path)
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or not isinstance(manifest.get("step"), int):
        raise _damaged(path, f"{MANIFEST} is none of a snapshot")
    if manifest.get("version") != VERSION:
        raise FastidcError(
            f"{path}: is a snapshot of version {manifest.get('version')}, and this fastidc reads {VERSION}; use the one that wrote it."
        )
    if path.name != name_of(manifest["step"]):
        raise _damaged(path, f"it says that it is of step {manifest['step']}")
    if STATE not in files:
        raise _damaged(path, f"{MANIFEST} names no {STATE}")
    for name, facts in files.items():
        _check_file(path, name, facts)
    named = [name for name in files if name.endswith(".safetensors") and name != BEST]
    tensors = {name.removesuffix(".safetensors"): _load_tensors(path / name, path) for name in named}
    state = _read_json(path / STATE, path)
    if state.get("step") != manifest["step"]:
        raise _damaged(path, f"its {STATE} says that it is of step {str(state.get('step'))[:40]}")
    return Snapshot(path, tensors, state)


def found(folder: Path) -> list[Path]:
    """Snapshots in ``folder`` by name, the newest first; none of them verified."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(p.name), p) for p in folder.iterdir() if p.is_dir())
    return [p for _, p in sorted(((int(match[1]), p) for match, p in named if match), reverse=True)]


def newest(folder: Path, say: Callable[[str], None] = lambda sentence: None) -> Snapshot | None:
    """The newest snapshot in ``folder`` that verifies, or None; ``say`` hears of each that does not and is passed over."""
    _recover(folder)
    for path in found(folder):
        try:
            return read(path)
        except FastidcError as error:
            say(f"passed over: {error}")
    return None


def _recover(folder: Path) -> None:
    """Gives back its name to a snapshot that a kill kept from being replaced."""
    for path in folder.glob(f"{_OLD}*") if folder.is_dir() else ():
        name = path.name.removeprefix(_OLD)
        with suppress(OSError):
            if not (folder / name).exists():
                path.rename(folder / name)


def set_aside(folder: Path, after: int) -> None:
    """Renames snapshots of later steps than ``after``, which a run passed over: they are neither counted nor found any more, but still there."""
    for path in found(folder):
        if int(path.name.removeprefix("step-")) > after:
            with suppress(OSError):
                path.rename(folder / f"passed-over-{path.name}-{secrets.token_hex(2)}")


def prune(folder: Path, keep: int) -> None:
    """Leaves the ``keep`` newest snapshots. One that cannot be taken away stays, and training goes on."""
    for path in found(folder)[keep:]:
        gone = folder / f"{_ASIDE}gone-{secrets.token_hex(4)}"  # under its own name half of it could be taken for a snapshot
        with suppress(OSError):
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Takes ``folder`` away with all that is in it, as `prune` does: a kill meanwhile leaves no half under a snapshot's name."""
    prune(folder, 0)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Takes away what earlier runs left half-written; for the one process that writes here."""
    for path in folder.glob(f"{_ASIDE}*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


class Writer:
    """Writes snapshots in a thread of its own, one at a time, while training goes on. ``written(path)`` is called there after each."""

    def __init__(self, folder: Path, keep: int, written: Callable[[Path], None] = lambda path: None):
        self.folder, self.keep, self.written = folder, keep, written
        self._thread: threading.Thread | None = None
        self._error: FastidcError | None = None

    def start(self, step: int, tensors: Tensors, state: Mapping[str, Any], best: Path | None = None) -> None:
        """Takes over ``tensors``, which nobody may change from now on. Waits for the one before; FastidcError where that one failed."""
        self.wait()

        def work() -> None:
            try:
                self.written(write(self.folder, step, tensors, state, best))
                prune(self.folder, self.keep)
            except FastidcError as error:
                self._error = error
            except Exception as error:  # in a thread it would be lost
                self._error = FastidcError(f"{self.folder / name_of(step)} cannot be written ({type(error).__name__}: {error}).")

        self._thread = threading.Thread(target=work, name="snapshot")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last one has failed and nobody has been told."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until what was started is on the disk; FastidcError where it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, name: str, facts: Any) -> None:
    if Path(name).name != name or name.startswith(".") or not isinstance(facts, dict):
        raise _damaged(path, f"{MANIFEST} names {name!r}, which no snapshot holds")
    file = path / name
    try:
        if file.is_symlink() or not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if (size := file.stat().st_size) != facts.get("bytes"):
            raise _damaged(path, f"{name} has {size} bytes instead of {facts.get('bytes')}")
        if digest(file) != facts.get("sha256"):
            raise _damaged(path, f"{name} does not have its checksum")
    except OSError as error:
        raise _damaged(path, f"{name} cannot be read, {error.strerror or error}") from None


def _damaged(path: Path, what: str) -> FastidcError:
    return FastidcError(f"{path}: a damaged snapshot, {what}; resume from another one.")


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    _sync(file)


def _load_tensors(file: Path, path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(file)
    except FastidcError as error:
        raise FastidcError(f"{error} It is of the snapshot {path}; resume from another one.") from None


def _save_bytes(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    _sync(file)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read_json(file: Path, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_plain(file, LARGEST_JSON))
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is no JSON"
        raise _damaged(path, f"{file.name} cannot be read, {reason}") from None
    if not isinstance(value, dict):
        raise _damaged(path, f"{file.name} is none of a snapshot")
    return value


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that later steps leave alone, contiguous. Copies from a GPU run beside each other and are waited for together."""
    out = {}
    for name, x in tensors.items():
        x = x.detach()
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
        out[name] = copy.copy_(x, non_blocking=True)
    if any(x.device.type == "cuda" for x in tensors.values()):
        torch.cuda.synchronize()
    return out
