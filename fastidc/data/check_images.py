"""Looking at image files: each once, as the loader will, and what is wrong with it in a word to count by."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastidc.data import limits, patience
from fastidc.data.datasets.flaws import Level
from fastidc.data.images import check_file, decode, reason
from fastidc.data.patience import Pool, under_way
from fastidc.errors import FastidcError
from fastidc.host import cores

Look = Literal["full", "ends", "none"]
_SIZE = 8  # decoded images are squashed to it: whether a file can be decoded does not depend on it
_AHEAD = 8  # files a thread
_SMALL, _LONG = 8, 10  # pixels a side, and times as long as wide, beyond which a note is due


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at a file has shown; ``size`` (width, height), ``mode`` and ``format`` as Pillow names them, where it got so far."""

    bytes: int = 0
    size: tuple[int, int] | None = None
    mode: str = ""
    format: str = ""
    kind: str = ""  # what is wrong, in a word; empty where nothing is
    what: str = ""  # the same as a clause
    fix: str = ""
    level: Level = "bad"


_REPLACE = "replace the file"


def look(path: Path, how: Look = "full") -> Seen:
    """The verdict of `fastidc.data.images.check_file`, and unless ``how`` is "ends" of `fastidc.data.images.decode`, on ``path``. Never raises."""
    try:
        facts = path.stat()
    except (OSError, ValueError) as error:  # of a name that none can have
        return Seen(kind="image-missing", what=f"image is missing ({getattr(error, 'strerror', None) or error})", fix="put it there")
    if wrong := limits.no_file(facts.st_mode):
        return Seen(kind="image-foreign", what=wrong, fix=_REPLACE)
    if wrong := limits.too_long(facts.st_size):
        return Seen(facts.st_size, kind="image-bomb", what=wrong, fix=_REPLACE)
    if not facts.st_size:
        return Seen(kind="image-empty", what="is empty, 0 bytes long", fix=_REPLACE)
    size, mode, kind = _header(path)
    try:
        check_file(path)
        if how == "full":
            decode(path, _SIZE)
    except FastidcError as error:
        word, what = _verdict(path, error.__context__ or error)
        return Seen(facts.st_size, size, mode, kind, word, what, _REPLACE)
    except Exception as error:  # a plugin of Pillow's that chokes on the file would end a run, too
        return Seen(facts.st_size, size, mode, kind, "image-broken", f"makes Pillow fail ({type(error).__name__}: {error})", _REPLACE)
    return Seen(facts.st_size, size, mode, kind, *_shape(size))


def _header(path: Path) -> tuple[tuple[int, int] | None, str, str]:
    from PIL import Image

    try:
        with patience.reading(path), limits.guarded(), Image.open(path) as image:
            return image.size, image.mode, image.format or ""
    except Exception:  # of whatever kind: the verdict comes from the loader's own functions
        return None, "", ""


def _verdict(path: Path, cause: BaseException) -> tuple[str, str]:
    """(kind, clause) of what Pillow or the disk has said."""
    from PIL import Image, UnidentifiedImageError

    said = " ".join(reason(cause).split())
    if isinstance(cause, Image.DecompressionBombError):
        return "image-bomb", f"is larger than Pillow decodes ({said})"
    if isinstance(cause, UnidentifiedImageError):
        return "image-foreign", "is no image that Pillow knows" + _sniffed(path)
    if any(sign in said.lower() for sign in ("truncat", "cut off", "unexpected end", "incomplete")):
        return "image-truncated", f"is cut off ({said})"
    return "image-broken", f"cannot be decoded ({said})"


def _sniffed(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError:
        return ""
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return ", but a web page: the download has failed"
    if start.startswith(b"version https://git-lfs"):
        return ", but a pointer of Git LFS: fetch the file with `git lfs pull`"
    return ", but a text" if start and all(9 <= byte < 127 for byte in start) else ""


def _shape(size: tuple[int, int] | None) -> tuple[str, str, str, Level]:
    """What is odd about an image that can be decoded: (kind, clause, way out, level), the first two empty where nothing is."""
    if size is None:
        return "", "", "", "note"
    shown, (short, long) = f"{size[0]} x {size[1]} pixels", sorted(size)
    if short == 1:
        return "image-tiny", f"has {shown}, which show nothing", _REPLACE, "bad"
    if short < _SMALL:
        return "image-tiny", f"has {shown}", "see whether that is meant", "note"
    if long > _LONG * short:
        return "image-long", f"has {shown}, and is squashed to a square", "see whether that is meant", "note"
    if size[0] * size[1] > limits.LARGE_PIXELS:
        return "image-large", f"has {shown}, of which Pillow warns, and takes long", "store it smaller", "note"
    return "", "", "", "note"


def look_at_all(paths: Iterable[Path], how: Look, workers: int | None = None, progress: bool = True) -> dict[Path, Seen]:
    """`look` at each of ``paths`` by ``workers`` threads (by default one a core), with a bar that says the rate. Of a file nothing but `Seen` is
    kept, so memory does not grow with the images."""
    paths = list(paths)
    workers = workers or cores()
    with warnings.catch_warnings(), Pool(workers) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of large images and odd metadata: what matters is in the table
        seen = under_way(pool, lambda path: look(path, how), paths, _AHEAD * workers)
        bar = tqdm(seen, total=len(paths), desc="check images", unit="image", leave=False, disable=not progress)
        return dict(zip(paths, bar, strict=True))


def same_bytes(first: Path, second: Path, seen: dict[Path, Seen]) -> bool:
    """Whether two files are one, or equal to the last byte. Files of different lengths are not read."""
    if first == second:
        return True
    if first not in seen or second not in seen or seen[first].bytes != seen[second].bytes or not seen[first].bytes:
        return False
    try:
        with first.open("rb") as one, second.open("rb") as other:
            while True:
                a, b = one.read(1 << 20), other.read(1 << 20)
                if a != b:
                    return False
                if not a:
                    return True
    except OSError:
        return False
