"""Pixels: decoding as the official code sees them, what every source of pixels offers, and a bounded memory of what was decoded."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from fastidc.data import limits, patience
from fastidc.errors import FastidcError
from fastidc.picked import Picked

_ORIENTATION = 0x0112  # of EXIF; 1 is upright


class Pixels(Protocol):
    """Where a loader gets its images from, and the only thing in which loaders differ. Safe to call from several threads."""

    size: int
    name: str  # as a user reads it

    def start(self, samples: Sequence[Sequence[Path]], pool: Executor, pinned: bool = False) -> Callable[[], Tensor | Picked]:
        """Starts to read the K images of each of ``samples`` on ``pool`` and returns what waits for them: uint8 [len(samples), K, size, size, 3],
        the caller's own, or picked from a store.

        pinned: in page-locked memory, from which a GPU copies while the host goes on. An error in a file is raised by the callable.
        """


def read(path: str | Path) -> bytes:
    """The content of the file at ``path``. FastidcError where there is none, or it is not what `fastidc.data.limits` lets pass."""
    with naming(path), limits.opened(path) as file:
        return limits.content(file)


def decode(path: str | Path, size: int) -> np.ndarray:
    """The image at ``path`` as uint8 [size, size, 3]: RGB, squashed with PIL's bicubic filter, never cropped (clip4idc.md 6.1)."""
    return decode_bytes(read(path), path, size)[0]


def decode_bytes(data: bytes, path: str | Path, size: int, upright: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """`check_file` and `decode` of a file whose content is ``data``: uint8 [size, size, 3] and the image's own (width, height). upright: turned as
    its EXIF says, which training leaves aside, as the official code does."""
    with _opened(data, path, upright) as image:
        return to_array(image, size), image.size


def picture(path: str | Path, upright: bool = False):
    """The image at ``path`` as a PIL image in RGB, in its own size; ``upright`` as in `decode_bytes`."""
    with _opened(read(path), path, upright) as image:
        return image.convert("RGB")


@contextmanager
def _opened(data: bytes, path: str | Path, upright: bool) -> Iterator:
    file = BytesIO(data)
    with naming(path), limits.guarded():
        image = _open(file, path)
        if image.format == "PNG":
            check_png_end(file)
        yield turned(image) if upright else image


def turned(image):
    """A PIL image the way up that its EXIF says."""
    from PIL import ImageOps

    return image if image.getexif().get(_ORIENTATION, 1) in (0, 1) else ImageOps.exif_transpose(image)


def _open(file: BinaryIO, path: str | Path):
    """The PIL image that begins in ``file``. UnidentifiedImageError names ``path``, where Pillow would name the buffer."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=limits.formats())
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"cannot identify image file {str(path)!r}") from None


def to_array(image, size: int) -> np.ndarray:
    """A PIL image of any mode as uint8 [size, size, 3]; see `decode`."""
    from PIL import Image

    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def check_file(path: Path) -> None:
    """FastidcError unless ``path`` begins as an image and, being PNG, ends as one; reads its two ends only, decodes nothing."""
    with naming(path), limits.guarded(), limits.opened(path) as file, _open(file, path) as image:
        if image.format == "PNG":
            check_png_end(file)


def check_png_end(file: BinaryIO) -> None:
    """OSError unless ``file`` ends as PNG does; leaves it where it stands."""
    before = file.tell()
    file.seek(-12, 2)
    end = file.read()
    file.seek(before)
    if end[4:8] != b"IEND":
        raise OSError("the file is cut off before its end")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What Pillow and the disk say about ``path``, as one sentence; and what `fastidc.data.patience` knows of."""
    try:
        with patience.reading(path):
            yield
    except FileNotFoundError:
        raise FastidcError(f"{limits.shown(path)}: no such image.") from None
    except Exception as error:  # a plugin of Pillow's raises whatever it likes
        raise FastidcError(
            f"{limits.shown(path)}: cannot be read as an image ({reason(error)}); replace the file or take its pair out of the annotations."
        ) from None


def reason(error: BaseException) -> str:
    """What Pillow or the disk has raised, as a clause."""
    from PIL import Image

    if isinstance(error, OSError):
        return str(error.strerror or error)
    if isinstance(error, (ValueError, SyntaxError, Image.DecompressionBombError)):
        return str(error)
    return f"Pillow fails with {type(error).__name__}: {error}"


def empty_batch(count: int, size: int, pinned: bool) -> Tensor:
    """uint8 [count, size, size, 3] to write into, page-locked where ``pinned``."""
    return torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=pinned)


def by_sample(images: Tensor, samples: Sequence[Sequence[Path]]) -> Tensor:
    """[B*K, H, W, 3] of B samples of K images each -> [B, K, H, W, 3]."""
    return images.unflatten(0, (len(samples), len(samples[0]) if samples else 0))


class ImageStore:
    """Pillow: `decode` with a memory of at most ``max_bytes``, so what fits is decoded once. A source of `Pixels`."""

    name = "Pillow"

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

    def start(self, samples: Sequence[Sequence[Path]], pool: Executor, pinned: bool = False) -> Callable[[], Tensor]:
        """See `Pixels`."""
        futures = [pool.submit(self.__getitem__, path) for sample in samples for path in sample]

        def wait() -> Tensor:
            batch = empty_batch(len(futures), self.size, pinned)
            for row, future in zip(batch.numpy(), futures, strict=True):
                row[...] = patience.result(future)
            return by_sample(batch, samples)

        return wait
