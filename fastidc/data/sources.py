"""Which source of pixels a run reads, and the cache as one: mapped from the disk, or held in memory."""

import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastidc.data.cache import HEADER_BYTES, Cache, default_path
from fastidc.data.images import ImageStore, Pixels, by_sample, empty_batch
from fastidc.data.resident import ResidentImages, bytes_of, free_bytes
from fastidc.errors import FastidcError
from fastidc.host import available_bytes

LOADERS = ("auto", "pillow", "dali", "cache", "memory", "resident")
DECODERS = ("pillow", "dali")  # of these, what reads the image files themselves
_AUTO_SHARE, _HOST_SHARE = 0.3, 0.5  # of free memory, on the device and on the host, that "auto" gives to images
_PART = 16  # images that one thread copies at a time


class CachedImages:
    """A cache as a source of `Pixels`: a batch is one gather of its rows. ``rows``: path -> row, see `Cache.rows`.

    in_memory: the images of ``rows`` are read once, into this process's memory; where ``device`` is a GPU that memory is page-locked, and the GPU
    fetches batches from it by itself. Else the cache stays on the disk, of which the system keeps in memory what fits, once for all processes.
    """

    def __init__(self, cache: Cache, rows: Mapping[Path, int], in_memory: bool = False, device: torch.device | str = "cpu"):
        self.size, self._rows, self._mapped, self._locked = cache.size, rows, None, None
        self.device = torch.device(device)
        self.name = f"cache in memory, {cache.path}" if in_memory else f"cache on disk, {cache.path}"
        if not in_memory:
            self._pixels, self._mapped = np.asarray(cache.pixels), cache.pixels.base
            return
        kept = np.unique(np.fromiter(rows.values(), dtype=np.int64, count=len(rows)))  # a run may need less than the cache holds
        place = {row: i for i, row in enumerate(kept.tolist())}
        self._rows = {path: place[row] for path, row in rows.items()}
        self._pixels = _in_memory(cache, kept)
        if self.device.type == "cuda":
            self._locked, self._stream = _page_locked(self._pixels, cache.path), torch.cuda.Stream(self.device)

    def __getitem__(self, path: Path) -> np.ndarray:
        """uint8 [size, size, 3], read-only."""
        image = self._pixels[self._row(path)]
        image.flags.writeable = False
        return image

    def _row(self, path: Path) -> int:
        try:
            return self._rows[path]
        except KeyError:
            raise FastidcError(f"{path}: is not among the images that {self.name} was opened for.") from None

    def start(self, samples: Sequence[Sequence[Path]], pool: Executor, pinned: bool = False) -> Callable[[], Tensor]:
        """See `Pixels`."""
        rows = [self._row(path) for sample in samples for path in sample]
        wait = self.gather(rows, pool, pinned) if self._locked is None else self._fetch(rows)
        return lambda: by_sample(wait(), samples)

    def _fetch(self, rows: Sequence[int]) -> Callable[[], Tensor]:
        """`gather` by the GPU, beside whatever else it does: a copy for each run of rows, as a scene's images are one."""
        index, at = np.asarray(rows, dtype=np.intp), 0
        with torch.cuda.stream(self._stream):
            batch = torch.empty(len(index), self.size, self.size, 3, dtype=torch.uint8, device=self.device)
            for first, count in _runs(index):
                batch[at : at + count].copy_(self._locked[first : first + count], non_blocking=True)
                at += count
            done = self._stream.record_event()

        def wait() -> Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            batch.record_stream(current)
            return batch

        return wait

    def gather(self, rows: Sequence[int], pool: Executor, pinned: bool = False) -> Callable[[], Tensor]:
        """`start` by rows of the cache."""
        batch = empty_batch(len(rows), self.size, pinned)
        out, index = batch.numpy(), np.asarray(rows, dtype=np.intp)
        if self._mapped is not None:
            self._announce(index)

        def copy(part: slice) -> None:
            # "clip" writes straight into ``out``, where the default goes through a buffer; every row is inside
            np.take(self._pixels, index[part], axis=0, out=out[part], mode="clip")

        futures = [pool.submit(copy, slice(first, first + _PART)) for first in range(0, len(index), _PART)]

        def wait() -> Tensor:
            for future in futures:
                future.result()
            return batch

        return wait

    def _announce(self, index: np.ndarray) -> None:
        """Asks the disk for all rows of a batch at once: touching them would wait for one piece after another."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        one, before = self._pixels[0].nbytes, HEADER_BYTES % mmap.ALLOCATIONGRANULARITY  # the map begins at a multiple of it
        for first, count in _runs(index):
            start = before + first * one
            aligned = start - start % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, aligned, start - aligned + count * one)


def _runs(index: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, how many) of rows that follow each other, as those of a scene do."""
    if len(index):
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        starts = [0, *breaks.tolist()]
        yield from ((int(index[a]), b - a) for a, b in zip(starts, [*starts[1:], len(index)], strict=True))


def _in_memory(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """Those rows of a cache, uint8 [len(rows), size, size, 3]."""
    needed, free = bytes_of(len(rows), cache.size), available_bytes()
    if free is not None and needed > free:
        raise FastidcError(
            f"{cache.path}: {len(rows):,} images are {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; read them with --loader "
            "cache."
        )
    pixels = np.empty((len(rows), cache.size, cache.size, 3), dtype=np.uint8)
    for first in tqdm(range(0, len(rows), 512), desc="cache to memory", unit="part", leave=False, delay=1):
        part = rows[first : first + 512]
        np.take(cache.pixels, part, axis=0, out=pixels[first : first + 512], mode="clip")
    return pixels


def _page_locked(pixels: np.ndarray, path: Path) -> Tensor:
    """``pixels``, page-locked for as long as they live. Not by ``pin_memory``, whose allocator takes the next power of two: 32 GiB for the 18 GB
    of CLEVR-Change."""
    runtime, address = torch.cuda.cudart(), pixels.ctypes.data
    if code := int(runtime.cudaHostRegister(address, pixels.nbytes, 0)):
        raise FastidcError(f"{path}: CUDA cannot page-lock {pixels.nbytes / 1e9:.1f} GB (error {code}); read it with --loader cache.")
    weakref.finalize(pixels, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(pixels)


@dataclass(frozen=True)
class Choice:
    """The source that a run reads, decided once and told to all of its processes."""

    loader: str  # any of `LOADERS` but "auto"
    cache: Path | None = None
    note: str | None = None  # for the user, where there was something to decide
    workers: int = 4  # threads that decode, where DALI has its own

    @property
    def decodes(self) -> bool:
        """Whether image files are decoded as the run goes on, so that they want a look before it; a cache has been compared with them."""
        return self.loader in DECODERS

    def open(self, root: str | Path, paths: Sequence[Path], size: int, device: torch.device) -> Pixels:
        """The source of ``paths`` for a model on ``device``; every process opens its own."""
        if self.loader == "pillow":
            return ImageStore(size)
        if self.loader == "dali":
            from fastidc.data.dali import DaliImages

            return DaliImages(size, device.type, threads=self.workers)
        cache = Cache(self.cache)
        rows = cache.rows(root, paths)
        if self.loader == "resident":
            return ResidentImages(cache, rows, device)
        return CachedImages(cache, rows, self.loader == "memory", device)


def choose(
    loader: str,
    cache: Path | None,
    root: str | Path,
    paths: Sequence[Path],
    size: int,
    workers: int = 4,
    device: torch.device | None = None,
    processes: int = 1,
) -> Choice:
    """What ``--loader`` and ``--cache`` mean for the images ``paths`` of the data set ``root`` at ``size``, trained on ``device`` (a CPU) by so many
    ``processes`` of this host.

    "auto": the cache that is given, else one in the data set's folder (`default_path`) that holds all images as they are now, else Pillow. A
    cache is held on a GPU where it takes 30% of the memory that is free there at most, else in each process's page-locked memory where all
    take half of the host's at most, else it stays on the disk, as it does for a CPU, which reads from the system's memory what was read before.
    It never takes DALI: on a CPU that costs about what Pillow does, a little less for PNG and a little more for JPEG; on a GPU it was not
    measured, and nvJPEG's pixels are other ones.
    FastidcError where a cache that was asked for does not fit, or DALI is asked for and absent; a cache that was only found is then passed
    over, which the note says.
    """
    if loader not in LOADERS:
        raise FastidcError(f"--loader is {loader!r}; one of {', '.join(LOADERS)} was expected.")
    if loader in DECODERS:
        if cache is not None:
            raise FastidcError(f"--loader {loader} reads no cache, and --cache names {cache}; leave one of them out.")
        if loader == "dali":
            from fastidc.data.dali_pipeline import require

            require()
        return Choice(loader, workers=workers)
    path, asked = cache or default_path(root, size), cache is not None or loader != "auto"
    if not asked and not path.is_file():
        note, others = None, sorted(found.name for found in path.parent.glob("fastidc-cache-*.bin"))
        if others:
            build = f"`fastidc cache build --data {root} --size {size}`"
            note = f"Images are decoded by Pillow: {others[0]} is not of {size} x {size}; {build} makes one that is."
        return Choice("pillow", note=note)
    try:
        opened = Cache(path)
        if opened.size != size:
            raise FastidcError(
                f"{path}: holds images of {opened.size} x {opened.size}, and the model reads {size} x {size}; build another cache with "
                f"`fastidc cache build --data {root} --size {size}`."
            )
        opened.check_fresh(root, opened.rows(root, paths), workers)
    except FastidcError as refusal:
        if asked:
            raise
        return Choice("pillow", note=f"Images are decoded by Pillow: {refusal}")
    place = "." if loader != "auto" else ""
    if loader == "auto":
        loader, place = fitting(bytes_of(len(paths), size), device or torch.device("cpu"), processes)
    return Choice(loader, path, " ".join([f"Images come from the cache {path}{place}", *opened.notes()]))


def fitting(needed: int, device: torch.device, processes: int) -> tuple[str, str]:
    """The fastest place for so many bytes of images, and the rest of the sentence that says so."""
    free, host = free_bytes(device), available_bytes()
    if free is None:
        return "cache", "."
    if needed <= _AUTO_SHARE * free:
        return "resident", f", held on {device}: {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free there."
    if host is not None and needed * processes <= _HOST_SHARE * host:
        return "memory", f", held in memory: {needed / 1e9:.1f} GB are too much for {device}, which has {free / 1e9:.1f} GB free."
    return "cache", f", read from the disk: {needed / 1e9:.1f} GB are too much for the memory of {device} and of this host."
