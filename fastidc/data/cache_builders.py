"""What decodes for a cache, what a cache remembers of it, and how far its pixels are from Pillow's."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastidc.data.images import decode_bytes, read
from fastidc.errors import FastidcError

BUILDERS = ("pillow", "dali")
COMPARED = 64  # images of a set, spread over it, that are decoded once more by Pillow
_AT_ONCE = 32  # images of a run of DALI
Decoded = tuple[np.ndarray, tuple[int, int]] | FastidcError  # uint8 [size, size, 3] and the image's own (width, height), or why not


@dataclass(frozen=True)
class Builder:
    facts: dict[str, str]  # what the index remembers
    decode: Callable[[Sequence[tuple[Path, bytes]]], list[Decoded]]  # of files and their content
    at_once: int  # files it wants together
    threads: int  # that call it; DALI has more of its own


def builder_of(name: str, size: int, workers: int) -> Builder:
    """The builder called ``name``. FastidcError for another name, and where DALI is absent or does not work."""
    import PIL

    if name == "pillow":
        facts = {"name": name, "version": PIL.__version__, "filter": "bicubic squash"}
        return Builder(facts, lambda files: [_pillow(data, path, size) for path, data in files], 1, workers)
    if name != "dali":
        raise FastidcError(f"--builder is {name!r}; one of {', '.join(BUILDERS)} was expected.")
    import torch

    from fastidc.data.dali import DaliImages

    images = DaliImages(size, "cuda" if torch.cuda.is_available() else "cpu", threads=workers)
    squash = {"dali": "its cubic squash", "pillow": "pillow's bicubic squash", "kernel": "our bicubic squash"}[images.squash]
    facts = {"name": name, "version": images.version, "filter": squash, "device": images.device.type, "pillow": PIL.__version__}
    return Builder(facts, images.decode, _AT_ONCE, 2)


def _pillow(data: bytes, path: Path, size: int) -> Decoded:
    try:
        return decode_bytes(data, path, size)
    except FastidcError as refusal:
        return refusal


def pillow_major(facts: dict[str, str]) -> int | None:
    """Of the Pillow that made a cache, or that made what DALI could not; None where the cache does not say."""
    version = facts.get("version" if facts["name"] == "pillow" else "pillow", "")
    major = version.partition(".")[0]
    return int(major) if major.isdigit() else None


def alike(facts: dict[str, str]) -> list[Any]:
    """The same for builders that may go on with each other's work: a release of Pillow changes pixels with its first number, DALI with any."""
    return [{key: value for key, value in facts.items() if key not in ("version", "pillow")}, pillow_major(facts)] + (
        [facts["version"]] if facts["name"] != "pillow" else []
    )


def said(facts: dict[str, str]) -> str:
    """ "pillow 13.0.0, bicubic squash" """
    device = f" on {facts['device']}" if "device" in facts else ""
    others = f"; pillow {facts['pillow']} for what DALI leaves to it" if "pillow" in facts else ""
    return f"{facts['name']} {facts['version']}{device}, {facts['filter']}{others}"


def to_compare(count: int) -> list[int]:
    """At most `COMPARED` rows of ``count``, spread evenly, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(COMPARED, count))})


def off_by(pixels: np.ndarray, crc32: int, path: Path, size: int) -> np.ndarray | None:
    """How many values of an image are off from Pillow's by 0, 1, ... 255 levels, int64 [256]; None where the file cannot be read any more or
    the pixels are not what was written."""
    if zlib.crc32(pixels) != crc32:
        return None
    try:
        truth, _ = decode_bytes(read(path), path, size)
    except FastidcError:
        return None
    return np.bincount(np.abs(pixels.astype(np.int16) - truth).ravel(), minlength=256)


def difference(counts: Sequence[np.ndarray | None]) -> dict[str, Any]:
    """What the index remembers of `off_by` of several images."""
    known = [count for count in counts if count is not None]
    total = np.sum(known, axis=0) if known else np.zeros(256, np.int64)
    largest = int(np.flatnonzero(total).max(initial=0))
    return {"images": len(known), "over_1": float(total[2:].sum() / max(total.sum(), 1)), "largest": largest}


def difference_said(measured: dict[str, Any]) -> str:
    """ "0.003% of values are off by more than 1 level, at most by 4 (64 images compared)" """
    return f"{measured['over_1']:.3%} of values are off by more than 1 level, at most by {measured['largest']} ({measured['images']} images compared)"


def other_pillow(facts: dict[str, str]) -> str | None:
    """A sentence where another Pillow than the installed one made a cache, by its first number; else None."""
    import PIL

    built, installed = pillow_major(facts), int(PIL.__version__.partition(".")[0])
    if built is None or built == installed:
        return None
    return f"It was built with Pillow {built}, and Pillow {installed} is installed: tall pictures may be off by a level here and there."
