"""NVIDIA DALI as a source of `Pixels`, and as what a cache is built with.

JPEG and PNG go through a DALI pipeline; everything else, and whatever DALI cannot decode, through Pillow, whose pixels take their place in
the batch. One bad image therefore costs no batch, and what is said of it is what Pillow's loader says.

What differs from Pillow, in DALI 2.4: on the CPU, squashed by Pillow or by our kernel, nothing; decoded pixels were equal in every file that was
compared. DALI's own squash is off by more than 1 level in 0.008% of the values of renderings, at most by 8, in none of soft pictures, and in
1% of noise and up to a quarter of tiny pictures enlarged, by up to 16. nvJPEG decodes a little otherwise than libjpeg, too. Of a JPEG that
was damaged inside, DALI sometimes gives what it had decoded until then where Pillow refuses it; `fastidc.data.dali_pipeline.is_usual_jpeg` keeps such files
from it: on the CPU, of 4,000 damaged at random, the two said the same of each. With `--on-bad-data skip` Pillow decides, whatever reads.

There is no state to save. The order is the loader's, a function of (seed, epoch, position); a source keeps none, and a pipeline's run sees
one batch and forgets it. A fresh source that begins at batch k gives the bytes that an older one gives from there on.

The GPU's part was written with care and has not run on a GPU yet; tests and figures are of the CPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastidc.data import patience
from fastidc.data.dali_pipeline import DaliError, Pipelines, Squash, require, squash_on, takes
from fastidc.data.images import decode_bytes, empty_batch, read
from fastidc.errors import FastidcError
from fastidc.host import cores

_LANES = 2  # batches on their way at a time: while one is copied out, the next is decoded
_LARGEST_RUN = 256 << 20  # decoded bytes of a run; photographs of 12 megapixels go seven at a time


@dataclass(frozen=True)
class Encoded:
    """A file that DALI decodes."""

    path: Path
    data: bytes
    width: int
    height: int

    def __len__(self) -> int:
        """Bytes when decoded."""
        return 3 * self.width * self.height


Found = Encoded | np.ndarray | FastidcError  # for DALI; decoded by Pillow, uint8 [size, size, 3]; or why it cannot be


@cache
def _placeholder() -> bytes:
    """The smallest picture, in the place of one that Pillow decodes; also what tells a DALI that fails from a file that does."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


class DaliImages:
    """A source of `Pixels` for images of any size, decoded by DALI (see this module) and never kept.

    device: "cpu", or a CUDA device, on which batches then lie. squash: "dali" is its cubic filter with antialias; "pillow",
    on a CPU, and "kernel", `fastidc.ops.squash` (on a CPU its reference, for tests), are Pillow's to the bit; "auto" takes Pillow on a CPU,
    and the kernel on a GPU that it serves. threads: of each of two pipelines; by default one a core, shared out among the processes of a
    node. most: samples a run, of which a larger batch takes several.

    FastidcError where DALI is absent, is for another CUDA than torch, or cannot decode a picture of its own.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", squash: Squash = "auto", threads: int | None = None, most: int = 64):
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.version, self.size, self.device, self._most = require(device), size, device, max(1, most)
        self.squash = squash_on(device, squash)
        self._pipelines = Pipelines(size, device, self.squash, threads or _cores(), self._most)
        self._lanes = ThreadPoolExecutor(_LANES, "dali")
        self._by_pillow: set[Path] = set()  # files that DALI has failed at
        where = "the GPU" if device.type == "cuda" else "the CPU"
        by = {"dali": "DALI", "pillow": "Pillow", "kernel": "our kernel"}[self.squash]
        self.name = f"DALI {self.version} on {where}, squashed by {by}"
        self._try_out()

    def start(self, samples: Sequence[Sequence[Path]], pool: Executor, pinned: bool = False) -> Callable[[], Tensor]:
        """See `Pixels`. Files are read on ``pool`` and decoded by threads of DALI's; batches are made two at a time, in any order, and a
        callable that is never called costs nothing more.

        On a GPU the batch lies there, complete, whatever stream is current, and ``pinned`` means nothing. Who uses it on another stream
        than that of the thread that waited for it tells the allocator (``Tensor.record_stream``).
        """
        found = [pool.submit(self._look, path) for sample in samples for path in sample]
        batch = self._lanes.submit(lambda: self._batch([patience.result(future) for future in found], len(samples), pinned))

        def wait() -> Tensor:
            pixels = batch.result()
            if pixels.is_cuda:
                pixels.record_stream(torch.cuda.current_stream(pixels.device))
            return pixels

        return wait

    def decode(self, files: Sequence[tuple[Path, bytes]]) -> list[tuple[np.ndarray, tuple[int, int]] | FastidcError]:
        """Of the content of each file what `fastidc.data.images.decode_bytes` gives, or the error that it raises."""
        sizes, found = [], []
        for path, data in files:
            if size := takes(data):
                sizes.append(size)
                found.append(Encoded(path, data, *size))
            else:
                pixels = _or_error(decode_bytes, data, path, self.size)
                sizes.append(None if isinstance(pixels, FastidcError) else pixels[1])
                found.append(pixels if isinstance(pixels, FastidcError) else pixels[0])
        out = self._filled(found, 1, False, lambda file: _or_error(decode_bytes, file.data, file.path, self.size))
        arrays = out[:, 0].cpu().numpy()
        return [one if isinstance(one, FastidcError) else (arrays[i], sizes[i]) for i, one in enumerate(found)]

    def _look(self, path: Path) -> Found:
        """What becomes of a file, with its content."""
        try:
            data = read(path)
            if path not in self._by_pillow and (size := takes(data)):
                return Encoded(path, data, *size)
            return decode_bytes(data, path, self.size)[0]
        except FastidcError as refusal:
            return refusal

    def _batch(self, found: list[Found], samples: int, pinned: bool) -> Tensor:
        """uint8 [samples, K, size, size, 3]; raises the first error."""
        _raise_first(found)  # before anything is decoded
        out = self._filled(
            found, len(found) // max(samples, 1), pinned, lambda file: _or_error(decode_bytes, file.data, file.path, self.size)
        )
        _raise_first(found)
        return out

    def _filled(self, found: list[Found], count: int, pinned: bool, by_pillow: Callable[[Encoded], Found]) -> Tensor:
        """uint8 [samples, count, size, size, 3] of ``found``, in which what DALI failed at is replaced by what ``by_pillow`` makes of it;
        where there are errors their pixels mean nothing."""
        gpu = self.device.type == "cuda"
        with self._pipelines.scope():
            if gpu:
                out = torch.empty(len(found), self.size, self.size, 3, dtype=torch.uint8, device=self.device)
            else:
                out = empty_batch(len(found), self.size, pinned)
        for part in self._parts(found, count):
            self._run(found, part, count, out, by_pillow)
        with self._pipelines.scope():
            for row, one in enumerate(found):
                if isinstance(one, tuple):  # of decode_bytes
                    one = one[0]
                if isinstance(one, np.ndarray):
                    out[row].copy_(torch.from_numpy(np.array(one)))
        return out.unflatten(0, (-1, count)) if count else out[:, None]

    def _parts(self, found: list[Found], count: int) -> Iterator[slice]:
        """Rows of whole samples, no more than `most` and `_LARGEST_RUN` allow, unless one sample alone is larger."""
        first, held = 0, 0
        for row in range(0, len(found), max(count, 1)):
            more = sum(len(one) for one in found[row : row + count] if isinstance(one, Encoded))
            if row > first and (held + more > _LARGEST_RUN or row - first >= self._most * count):
                yield slice(first, row)
                first, held = row, 0
            held += more
        if first < len(found):
            yield slice(first, len(found))

    def _run(self, found: list[Found], part: slice, count: int, out: Tensor, by_pillow: Callable[[Encoded], Found]) -> None:
        """One run of a pipeline into the rows ``part`` of ``out``; where it fails, of ever fewer images, until those to blame are alone."""
        rows = range(part.start, part.stop)
        encoded = [row for row in rows if isinstance(found[row], Encoded)]
        if not encoded:
            return
        fed = [found[row].data if isinstance(found[row], Encoded) else _placeholder() for row in rows]
        try:
            self._pipelines.run([fed[i : i + count] for i in range(0, len(fed), count)], out[part].unflatten(0, (-1, count)))
        except DaliError:
            self._try_out()  # whether it is the files at all
            self._rescue(found, encoded, out, by_pillow)

    def _rescue(self, found: list[Found], rows: list[int], out: Tensor, by_pillow: Callable[[Encoded], Found]) -> None:
        """Each image of a batch that failed: by DALI where it can, so that an image's pixels do not depend on its neighbours."""
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if not half:
                continue
            with self._pipelines.scope():
                pixels = torch.empty(len(half), 1, *out.shape[1:], dtype=torch.uint8, device=out.device)
            try:
                for first in range(0, len(half), self._most):
                    part = half[first : first + self._most]
                    self._pipelines.run([[found[row].data] for row in part], pixels[first : first + len(part)])
            except DaliError:
                if len(half) > 1:
                    self._rescue(found, half, out, by_pillow)
                else:
                    self._by_pillow.add(found[half[0]].path)
                    found[half[0]] = by_pillow(found[half[0]])
                continue
            with self._pipelines.scope():
                out[half] = pixels[:, 0]

    def _try_out(self) -> None:
        """FastidcError where DALI cannot even decode a picture of ours, so that files are not blamed for it."""
        with self._pipelines.scope():
            pixels = torch.empty(1, 1, self.size, self.size, 3, dtype=torch.uint8, device=self.device)
        try:
            self._pipelines.run([[_placeholder()]], pixels)
        except DaliError as error:
            raise FastidcError(f"{self.name} decodes nothing here ({error}); read the images with Pillow (--loader pillow).") from None


def _or_error(function: Callable, *given):
    try:
        return function(*given)
    except FastidcError as refusal:
        return refusal


def _raise_first(found: Sequence[Found]) -> None:
    for one in found:
        if isinstance(one, FastidcError):
            raise one


def _cores() -> int:
    return max(1, cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
