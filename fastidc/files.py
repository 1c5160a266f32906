"""Writing a file so that a reader sees the old one or the new one, never half of it."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text beside ``path`` and move it there; missing folders are made. Raises FastidcError where that fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are private to the user, and the report of a shared machine should follow the umask.
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise FastidcError(
            f"{path} cannot be written ({error.strerror or error}); choose a folder with room that you may write to."
        ) from error
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """`write_text` of ``value`` as indented JSON."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
