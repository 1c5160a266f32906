"""The cache as a loader: mapped from the disk, warm and cold, and held in memory; and its build with one worker and with several."""

import atexit
import functools
import itertools
import mmap
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.case import Case, Variant

ROWS = 2048  # of the cache that is read: 308 MB, more than any processor keeps
CORES = os.cpu_count() or 1


def variants() -> list[Variant]:
    counts = sorted({1, CORES})
    return [
        *(Variant(f"cache on disk, {threads_said(n)}", lambda case, n=n: _gather(case, n), ours=True) for n in counts),
        Variant(f"cache on disk, {threads_said(CORES)}, cold", lambda case: _gather(case, CORES, cold=True), _no_advice, ours=True),
        Variant("cache in memory, 1 thread", lambda case: _gather(case, 1, in_memory=True), ours=True),
    ]


def build_variants() -> list[Variant]:
    """Named as the decoding is, so that the ratio is to one worker."""
    return [
        *(Variant(f"Pillow, {threads_said(n)}", lambda case, n=n: _build(n), ours=n > 1) for n in sorted({1, 2, CORES})),
        Variant(f"DALI, {threads_said(CORES)}", lambda case: _build(CORES, "dali"), ours=True, needs=("nvidia.dali",)),
    ]


def threads_said(count: int) -> str:
    """ "1 thread", "2 threads" """
    return f"{count} thread{'s' * (count > 1)}"


def _no_advice(case: Case) -> list[str]:
    return [] if hasattr(os, "posix_fadvise") else ["this system cannot be told to forget a file."]


@functools.cache
def cache_of(paths: tuple[str, ...], side: int, cold: bool, least: int = ROWS) -> tuple[Path, tuple[tuple[int, ...], ...]]:
    """A cache that holds ``paths`` many times over, ``least`` rows at least, shuffled, and for each time the rows of ``paths``. A file of its own for ``cold``:
    pages that another map shows are not forgotten."""
    from fastidc.data.cache import HEADER_BYTES, Entry, Header, digest_of, write_index
    from fastidc.data.images import decode

    pixels = np.stack([decode(path, side) for path in paths])
    times = max(2, -(-least // len(paths)))
    places = np.random.default_rng(0).permutation(times * len(paths)).reshape(times, len(paths))
    owner = np.empty(places.size, dtype=int)
    for turn in places:
        owner[turn] = np.arange(len(paths))
    folder = Path(tempfile.mkdtemp(prefix="fastidc-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = folder / "cache.bin"
    about = {"builder": {"name": "bench", "version": "", "filter": ""}, "dataset": "", "root": "", "built": ""}
    index = write_index(about, [Entry(f"{row}.png", 0, 0, "", side, side, 0) for row in range(places.size)])
    start = HEADER_BYTES + places.size * pixels[0].nbytes
    with name.open("wb") as file:
        file.write(Header(True, places.size, side, side, start, len(index), digest_of(index, 32)).pack())
        for row in owner:
            file.write(pixels[row])
        file.write(index)
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk yet cannot be forgotten
    return name, tuple(tuple(turn.tolist()) for turn in places)


def _gather(case: Case, workers: int, in_memory: bool = False, cold: bool = False):
    """`fastidc.data.sources.CachedImages.gather`; every call takes other rows, which hold the same images."""
    from fastidc.data.cache import Cache
    from fastidc.data.sources import CachedImages

    pool, turns, kept = ThreadPoolExecutor(workers), itertools.count(), {}
    pinned = case.device == "cuda"

    def run(paths: tuple[str, ...], side: int) -> Tensor:
        if (paths, side) not in kept:
            name, places = cache_of(paths, side, cold)
            cache = Cache(name)
            everything = {Path(str(row)): row for row in range(len(cache.pixels))}
            kept[paths, side] = cache, CachedImages(cache, everything, in_memory), places
        cache, source, places = kept[paths, side]
        rows = places[next(turns) % len(places)]
        if cold:
            _forget(cache)
        return source.gather(rows, pool, pinned)().to(case.device, non_blocking=True)

    return run


def _forget(cache) -> None:
    """Takes the file out of this process's map and out of the system's page cache, where only the last call's rows are: microseconds, and part
    of what is timed. A disk, or the host of a virtual one, may remember."""
    cache.pixels.base.madvise(mmap.MADV_DONTNEED)
    with cache.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _build(workers: int, builder: str = "pillow"):
    """`fastidc.data.cache_build.build` of all files into an empty folder, to the disk and back."""
    from fastidc.data.cache import Cache
    from fastidc.data.cache_build import build

    folder = Path(tempfile.mkdtemp(prefix="fastidc-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def run(paths: tuple[str, ...], side: int) -> Tensor:
        out = folder / "cache.bin"
        out.unlink(missing_ok=True)
        build([Path(path) for path in paths], Path(paths[0]).parent, out, side, workers, builder, progress=False)
        return torch.from_numpy(np.array(Cache(out).pixels))

    return run
