"""Pixels: decoding as the official code sees them, and a bounded memory of what was decoded."""

import threading
from pathlib import Path

import numpy as np

from fastidc.errors import FastidcError


def decode(path: str | Path, size: int) -> np.ndarray:
    """The image at ``path`` as uint8 [size, size, 3]: RGB, squashed with PIL's bicubic filter, never cropped (clip4idc.md 6.1)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return to_array(image, size)
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such image.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FastidcError(
            f"{path}: cannot be read as an image ({error}); replace the file or take its pair out of the annotations."
        ) from None


def to_array(image, size: int) -> np.ndarray:
    """A PIL image of any mode as uint8 [size, size, 3]; see `decode`."""
    from PIL import Image

    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def check_file(path: Path) -> None:
    """FastidcError unless ``path`` begins as an image and, being PNG, ends as one; reads its two ends only, decodes nothing."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            is_png = image.format == "PNG"
        if is_png:
            with path.open("rb") as file:
                file.seek(-12, 2)
                if file.read()[4:8] != b"IEND":
                    raise OSError("the file is cut off before its end")
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such image.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FastidcError(
            f"{path}: cannot be read as an image ({error}); replace the file or take its pair out of the annotations."
        ) from None


class ImageStore:
    """`decode` with a memory of at most ``max_bytes``: what fits is decoded once. Safe to call from several threads."""

    def __init__(self, size: int, max_bytes: int = 2 << 30):
        self.size = size
        self._room = max_bytes
        self._kept: dict[Path, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getitem__(self, path: Path) -> np.ndarray:
        """uint8 [size, size, 3], read-only."""
        image = self._kept.get(path)
        if image is None:
            image = decode(path, self.size)
            with self._lock:
                if image.nbytes <= self._room and path not in self._kept:
                    self._kept[path] = image
                    self._room -= image.nbytes
        return image
