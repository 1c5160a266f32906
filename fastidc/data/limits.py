"""What a file of an image may be, for everyone who reads one: Pillow's loader, DALI's, and whoever builds a cache ask here, so that they say the
same of it. How long one may take is `fastidc.data.patience`'s.

The limits are ours and not the process's: what a program has set of Pillow's own (``Image.MAX_IMAGE_PIXELS``, ``ImageFile.LOAD_TRUNCATED_IMAGES``)
changes no verdict, and is as it was when nothing is being decoded.
"""

import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 256 << 20
"""Of a file. A photograph of 100 megapixels is a tenth of it."""
MOST_PIXELS = 178_956_970
"""Of a picture, width times height: Pillow's own limit where nobody has changed it. It takes 0.5 GB as RGB."""
LARGE_PIXELS = MOST_PIXELS // 2
"""Beyond it Pillow warns. Such a picture is decoded, and `fastidc check` notes it."""

_lock = threading.Lock()
_inside = 0  # threads in `guarded`
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings` keeps it
_before: tuple[int | None, bool] = (None, False)


@cache
def formats() -> tuple[str, ...]:
    """Names of the formats that Pillow decodes by itself: EPS it hands to another program, Ghostscript."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def shown(path: str | os.PathLike[str]) -> str:
    """``path`` for a sentence: bytes of its name that are no UTF-8 are escaped, so that any terminal and file takes it."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def no_file(mode: int) -> str:
    """What a thing of that ``st_mode`` is instead of a file, as a clause; empty where it is one."""
    if stat.S_ISREG(mode):
        return ""
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"))
    return f"is a {next((name for test, name in kinds if test(mode)), 'device')} and no file"


def too_long(length: int) -> str:
    """What is wrong with a file of so many bytes, as a clause; empty where nothing is."""
    return f"is {length:,} bytes long, more than the {MOST_BYTES:,} that are read" if length > MOST_BYTES else ""


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file at ``path``, open for reading. OSError where it is none, of which nothing is opened (a pipe would wait for its writer), or too long."""
    facts = os.stat(path)
    if wrong := no_file(facts.st_mode) or too_long(facts.st_size):
        raise OSError(f"it {wrong}")
    with open(path, "rb") as file:
        yield file


def content(file: BinaryIO) -> bytes:
    """All of an open file. OSError where it has grown too long meanwhile."""
    length = os.fstat(file.fileno()).st_size
    data = file.read(length + 1)  # room for as much is made beforehand
    if len(data) > length:
        data += file.read(MOST_BYTES + 1 - len(data))
    if wrong := too_long(len(data)):
        raise OSError(f"it {wrong}")
    return data


@contextmanager
def guarded() -> Iterator[None]:
    """Around all that Pillow does with a file: `MOST_PIXELS` is its limit (a DecompressionBombError), also of the frames and thumbnails inside; its
    warnings are neither heard nor raised, and a file that is cut off is refused. Any number of threads may be inside."""
    global _inside, _before
    from PIL import Image, ImageFile

    with _lock:
        if not _inside:
            _before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        _inside += 1
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = LARGE_PIXELS, False  # Pillow refuses at twice as many
        if _QUIET not in warnings.filters:
            warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = _before
                with suppress(ValueError):  # whoever has put back older filters meanwhile has taken it away
                    warnings.filters.remove(_QUIET)
