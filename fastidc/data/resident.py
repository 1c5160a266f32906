"""A cache in the memory of the device that trains: of a batch, only the rows of its images travel."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastidc.data.cache import Cache
from fastidc.errors import FastidcError
from fastidc.picked import Picked, Store

SHARE = 0.5
"""Of a device's free memory, how much images may take; the rest is for training."""
_PART = 64 << 20  # bytes that are copied at a time


class ResidentImages:
    """A source of `fastidc.data.images.Pixels`: the images of ``rows`` (path -> row, see `Cache.rows`) are copied to ``device`` once, and batches
    are `Picked` from there. Nothing is decoded, gathered or copied by the host afterwards; `fastidc.ops.patches` gathers where pixels are read.

    FastidcError where they need more than `SHARE` of the device's free memory.
    """

    def __init__(self, cache: Cache, rows: Mapping[Path, int], device: torch.device):
        self.size = cache.size
        self.name = f"cache in the memory of {device}, {cache.path}"
        kept = np.unique(np.fromiter(rows.values(), dtype=np.int64, count=len(rows)))  # a run may need less than the cache holds
        needed, free = bytes_of(len(kept), self.size), free_bytes(device)
        if free is not None and needed > SHARE * free:
            raise FastidcError(
                f"{cache.path}: {len(kept):,} images are {needed / 1e9:.1f} GB, more than {SHARE:.0%} of the {free / 1e9:.1f} GB that are free on "
                f"{device}; read them with --loader memory or --loader cache."
            )
        place = {row: i for i, row in enumerate(kept.tolist())}
        self._index = {path: place[row] for path, row in rows.items()}
        self.store = Store(_copied(cache, kept, device))

    def __getitem__(self, path: Path) -> np.ndarray:
        """uint8 [size, size, 3]"""
        return self.store.pixels[self._place(path)].cpu().numpy()

    def _place(self, path: Path) -> int:
        try:
            return self._index[path]
        except KeyError:
            raise FastidcError(f"{path}: is not among the images that {self.name} was opened for.") from None

    def start(self, samples: Sequence[Sequence[Path]], pool: Executor, pinned: bool = False) -> Callable[[], Picked]:
        """See `Pixels`."""
        index = torch.tensor([[self._place(path) for path in sample] for sample in samples], dtype=torch.long)
        picked = Picked(self.store, index.pin_memory() if pinned else index)
        return lambda: picked


def bytes_of(images: int, size: int) -> int:
    """What so many decoded images take."""
    return images * size * size * 3


def free_bytes(device: torch.device) -> int | None:
    """Memory that ``device`` has left; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _copied(cache: Cache, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [len(rows), size, size, 3] on ``device``. Parts pass through page-locked memory, from which a GPU copies at its own speed."""
    out = torch.empty(len(rows), cache.size, cache.size, 3, dtype=torch.uint8, device=device)
    step = max(1, _PART // max(1, bytes_of(1, cache.size)))
    part = torch.empty(min(step, len(rows)), *out.shape[1:], dtype=torch.uint8, pin_memory=device.type == "cuda")
    starts = range(0, len(rows), step)
    for first in tqdm(starts, desc=f"cache to {device}", unit="part", leave=False, delay=1):
        chosen = rows[first : first + step]
        np.take(cache.pixels, chosen, axis=0, out=part.numpy()[: len(chosen)], mode="clip")
        out[first : first + step].copy_(part[: len(chosen)])  # waits, so that the part can be filled anew
    return out
