"""Writing a file so that a reader sees the old one or the new one, never half of it."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
