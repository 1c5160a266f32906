"""Pictures inside a page: small, compressed, and together below a size that is known before the first is made."""

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastidc.data.images import picture
from fastidc.errors import FastidcError

PAGE_BYTES = 18_000_000  # of all pictures of a page, as the page holds them
_LARGEST = 32_000  # bytes of one picture: few pairs do not make them larger than a reader can see
_SIDE = 400  # pixels of its longer side
_QUALITIES = (82, 70, 55, 40)


@dataclass(frozen=True)
class Thumbnail:
    """A data: address and the picture's size in pixels."""

    uri: str
    width: int
    height: int


def budget(pictures: int) -> int:
    """Bytes that each of so many pictures may take in a page. Base64 makes four characters of three bytes."""
    return min(_LARGEST, math.floor(PAGE_BYTES * 3 / 4 / max(1, pictures)))


def read_picture(path: str | os.PathLike[str], pair: str, which: str):
    """The image as RGB, as the model sees it (no alpha, no rotation), at most `_SIDE` pixels a side. FastidcError names the pair and the file."""
    from PIL import Image

    try:
        image = picture(path)
    except FastidcError as error:
        raise FastidcError(f"{error} It is the {which} image of pair {pair!r}.") from error
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return image


@cache
def _map_format() -> str:
    from PIL import features

    return "WEBP" if features.check("webp") else "JPEG"


def thumbnail(picture, most: int, *, side: int = _SIDE, kind: str = "JPEG") -> Thumbnail:
    """A PIL image of mode RGB, at most ``side`` pixels a side and ``most`` bytes: first its quality gives way, then its size. kind: JPEG, or
    WEBP, which is JPEG where Pillow was built without it."""
    from PIL import Image

    kind = _map_format() if kind == "WEBP" else kind
    while True:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            file = io.BytesIO()
            small.save(file, kind, quality=quality, **({"optimize": True} if kind == "JPEG" else {"method": 4}))
            data = file.getvalue()
            if len(data) <= most or (side <= 48 and quality == _QUALITIES[-1]):
                address = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"
                return Thumbnail(address, *small.size)
        side = max(48, side * 3 // 4)


def mosaic(rows: Sequence[Sequence[Any]], width: int, height: int):
    """PIL images, row by row, in one picture of about ``width`` x ``height`` pixels, each squeezed into a tile of the same size."""
    from PIL import Image

    gap = 2
    tile = max(1, width // len(rows[0])), max(1, height // len(rows))
    whole = Image.new("RGB", (tile[0] * len(rows[0]), tile[1] * len(rows)), (128, 128, 128))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            size = max(1, tile[0] - gap), max(1, tile[1] - gap)
            whole.paste(image.resize(size, Image.Resampling.LANCZOS), (x * tile[0] + gap // 2, y * tile[1] + gap // 2))
    return whole
