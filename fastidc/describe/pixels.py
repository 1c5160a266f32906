"""Pixels of whatever a pair is given as, decoded by threads ahead of the model, one bad image costing its own pair only."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastidc.data.images import decode_bytes, picture, read, to_array, turned
from fastidc.errors import FastidcError
from fastidc.host import cores

AHEAD = 2  # batches that are being decoded while one is in use
_CHANNELS = (1, 3, 4)  # L, RGB, RGBA

Image = Any  # a path, a PIL image, or a uint8 array


def to_pixels(image: Image, size: int, name: str = "image") -> np.ndarray:
    """uint8 [size, size, 3] of an image, the same for each way to give it: see `fastidc.data.images.decode`, but turned as its EXIF says.

    image: a path; a PIL image of any mode; a uint8 NumPy array [H, W] or [H, W, 1, 3 or 4]; a uint8 tensor [H, W], [1, 3 or 4, H, W] or
    [H, W, 1, 3 or 4]. name: what a FastidcError calls it where it has no path.
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        return _said(str(path), lambda: decode_bytes(read(path), path, size, upright=True)[0])
    return _said(name, lambda: to_array(to_pil(image, name), size))


def to_pil(image: Image, name: str = "image"):
    """A PIL image of what `to_pixels` takes, in its own size and upright; a path is opened and read whole."""
    from PIL import Image as Pillow

    if isinstance(image, Pillow.Image):
        return turned(image)
    if isinstance(image, (str, os.PathLike)):
        return picture(Path(image), upright=True)
    is_tensor = isinstance(image, Tensor)
    if not is_tensor and not isinstance(image, np.ndarray):
        raise FastidcError(f"{name}: is of type {type(image).__name__}; a path, a PIL image or a uint8 array was expected.")
    values = image.detach().cpu().numpy() if is_tensor and image.dtype == torch.uint8 else image
    if values.dtype != np.uint8:
        raise FastidcError(f"{name}: has numbers of {values.dtype}; an array of an image holds uint8, 0 to 255.")
    shape = list(values.shape)
    if values.ndim == 3:
        first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
        if first and (is_tensor or not last):  # each library's own layout goes first
            values = values.transpose(1, 2, 0)
        elif not last:
            raise FastidcError(f"{name}: has shape {shape}; [H, W], [H, W, 3] or [3, H, W] was expected.")
        values = values[..., 0] if values.shape[2] == 1 else values
    elif values.ndim != 2:
        raise FastidcError(f"{name}: has shape {shape}; one image, [H, W], [H, W, 3] or [3, H, W], was expected.")
    if not values.size:
        raise FastidcError(f"{name}: has shape {shape}, no pixels; an image needs some.")
    return Pillow.fromarray(np.ascontiguousarray(values))


def _said(name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What Pillow raises beside what `decode` expects is a sentence too: a damaged file must cost its own pair only."""
    try:
        return read()
    except FastidcError:
        raise
    except Exception as error:
        raise FastidcError(
            f"{name}: cannot be read as an image ({type(error).__name__}: {error}); replace it or leave its pair out."
        ) from None


@dataclass(frozen=True)
class Batch:
    """Pairs as they were given, and the pixels of those that could be read."""

    pairs: list[tuple[Image, Image]]
    errors: list[FastidcError | None]  # of each pair
    images: Tensor  # uint8 [pairs without an error, 2, S, S, 3]


def batches(
    pairs: Iterable[tuple[Image, Image]], size: int, batch_size: int, workers: int | None = None, pinned: bool = False
) -> Iterator[Batch]:
    """``pairs`` in order, ``batch_size`` at a time, read by ``workers`` threads `AHEAD` batches ahead; ``pairs`` is asked as late as that
    allows. An error that ``pairs`` itself raises comes after the batches that it had given."""
    if batch_size < 1:
        raise FastidcError(f"batch_size must be at least 1, got {batch_size}.")
    if workers is not None and workers < 1:
        raise FastidcError(f"workers must be at least 1, got {workers}.")
    pool = ThreadPoolExecutor(max_workers=workers or min(16, cores()))
    waiting: deque[Callable[[], Batch]] = deque()
    source, failure, rows = iter(pairs), None, 0
    try:
        while True:
            chunk: list[tuple[Image, Image]] = []
            try:
                chunk.extend(islice(source, batch_size))
            except Exception as error:  # said when what came before it is done
                failure = error
            if chunk:
                waiting.append(_start(chunk, rows, size, pool, pinned))
                rows += len(chunk)
            if not chunk or failure is not None:
                break
            if len(waiting) > AHEAD:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(chunk: list[tuple[Image, Image]], first: int, size: int, pool: ThreadPoolExecutor, pinned: bool) -> Callable[[], Batch]:
    images = torch.empty(len(chunk), 2, size, size, 3, dtype=torch.uint8, pin_memory=pinned)
    rows = images.numpy()

    def read(row: int, side: int) -> None:
        rows[row, side] = to_pixels(chunk[row][side], size, f"the {('before', 'after')[side]}-image of pair {first + row}")

    futures = [[pool.submit(read, row, side) for side in (0, 1)] for row in range(len(chunk))]

    def wait() -> Batch:
        errors = [_error(sides) for sides in futures]
        good = [row for row, error in enumerate(errors) if error is None]
        return Batch(chunk, errors, images if len(good) == len(chunk) else images[good])

    return wait


def _error(sides: list[Future]) -> FastidcError | None:
    found = None
    for future in reversed(sides):  # both are waited for: their rows must not be written to later
        try:
            future.result()
        except FastidcError as error:
            found = error
    return found
