"""Writing a file so that a reader sees the old one or the new one, never half of it; and reading one that may be anything."""

import errno
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastidc.errors import FastidcError


@contextmanager
def aside(path: str | os.PathLike[str], errors: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends well and else disappears; missing folders are made.

    Raises FastidcError for an OSError, for a RuntimeError (torch's way to say that a disk is full) and for ``errors`` besides.
    """
    path = Path(path)
    # Not tempfile: its files are private to the user, and what a shared machine's users read should follow the umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, *errors) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise FastidcError(f"{path} cannot be written ({reason}); choose a folder with room that you may write to.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text beside ``path`` and move it there; missing folders are made. Raises FastidcError where that fails."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """`write_text` of ``value`` as indented JSON."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: str | os.PathLike[str], value: Any) -> None:
    """Adds ``value`` as a line of JSON to a file that is made where it is not there. FastidcError where that fails."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    except OSError as error:
        raise FastidcError(
            f"{path} cannot be written ({error.strerror or error}); choose a folder with room that you may write to."
        ) from error


@contextmanager
def exclusive(path: str | os.PathLike[str], what: str, lenient: bool = False) -> Iterator[None]:
    """Holds the lock file ``path`` while the block runs, so that one process at a time makes ``what``; FastidcError names who else does.

    The system lets go of the lock when its process ends, however it ends, so one that is left behind by a process of this machine is
    taken over. Of another machine's that cannot be known, and the sentence says what to do. lenient: such a one is taken over too, because what
    was killed there has to go on here unasked; and where the file system knows no locks, none is held.
    """
    path = Path(path)
    with _lock_file(path, what, lenient) as file:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk is the block's business; the lock holds without a name in it
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(me).encode())
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # still locked, so nobody else's


def _lock_file(path: Path, what: str, lenient: bool) -> IO[str]:
    """``path``, open and locked by this process; FastidcError where another one has it, or where it cannot be made."""
    import fcntl  # not on Windows

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(file)
                file.close()
                raise FastidcError(f"{what} is being made by {_named(owner)}; wait until it is done, then run this again.") from None
            except OSError as error:
                if not lenient or error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.close()  # its owner took the file away between our opening and our locking it
    except OSError as error:
        raise FastidcError(
            f"{path} cannot be written ({error.strerror or error}); choose a folder with room that you may write to."
        ) from error
    owner = _owner(file)
    if not lenient and owner.get("host", socket.gethostname()) != socket.gethostname():
        file.close()
        raise FastidcError(
            f"{what} is being made by {_named(owner)}, as {path} says; wait until it is done, or delete that file if it no longer runs."
        )
    return file


def _owner(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:  # killed before it had written
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'this machine')} since {owner.get('since', 'just now')}"


def sync_folder(path: Path) -> None:
    """Brings the names in the folder ``path`` to the disk, where the system can."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


LARGEST_JSON = 64 << 20
"""Bytes of a file that fastidc writes itself: a config, a manifest, a quarantine. A quarantine of all of CLEVR-Change would have about 15 MB."""


def open_plain(path: str | os.PathLike[str], largest: int | None = None) -> IO[bytes]:
    """``path``, open for reading; OSError where it is no plain file (a pipe would be waited for without end) or has more than ``largest`` bytes."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        held = os.fstat(number)
        if stat.S_ISDIR(held.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(held.st_mode):
            raise OSError("it is a pipe, a socket or a device, and no plain file")
        if largest is not None and held.st_size > largest:
            raise OSError(f"it has {held.st_size:,} bytes, more than the {largest:,} that are read")
        return os.fdopen(number, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(number)
        raise


def read_plain(path: str | os.PathLike[str], largest: int = LARGEST_JSON) -> bytes:
    """The bytes of a plain file of at most ``largest``; OSError otherwise, see `open_plain`."""
    with open_plain(path, largest) as file:
        return file.read()


def parse_json(text: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """`json.loads`, with ValueError for whatever it refuses: brackets nested too deep are one. ``hook``: its object_pairs_hook."""
    try:
        return json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
