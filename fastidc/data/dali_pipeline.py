"""DALI below `fastidc.data.dali`: whether it is there, which files it decodes as Pillow does, and the pipelines themselves."""

import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastidc.data import limits
from fastidc.data.images import to_array
from fastidc.errors import FastidcError

By = Literal["pillow", "dali", "kernel"]
Squash = Literal["auto", "pillow", "dali", "kernel"]
_WAY_OUT = "or read the images with Pillow (--loader pillow, --builder pillow)"
_MODES = {"PNG": ("L", "LA", "P", "RGB", "RGBA"), "JPEG": ("L", "RGB")}
_PNG_DEPTH = 24  # place of the bits a channel, in the header that every PNG begins with


class DaliError(Exception):
    """DALI could not make a batch; which of its images is to blame it does not say."""


def require(device: torch.device | None = None) -> str:
    """DALI's version. FastidcError where it is absent, cannot be loaded, or, for a CUDA ``device``, was built for another CUDA than torch."""
    try:
        import nvidia.dali as dali
    except ModuleNotFoundError as error:
        if error.name not in (None, "nvidia", "nvidia.dali"):
            raise FastidcError(f"DALI cannot be loaded ({error}); install the package {error.name}, {_WAY_OUT}.") from None
        raise FastidcError(
            f"DALI is not installed; `pip install 'fastidc[cuda13]'` brings it ('fastidc[cuda12]' for CUDA 12), {_WAY_OUT}."
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise FastidcError(f"DALI cannot be loaded ({_first_line(error)}); install it again, {_WAY_OUT}.") from None
    if device is not None and device.type == "cuda":
        built, ours = dali.__cuda_version__ // 1000, int((torch.version.cuda or "0").partition(".")[0])
        if built != ours:
            raise FastidcError(
                f"DALI {dali.__version__} is built for CUDA {built} and torch for CUDA {ours}; install nvidia-dali-cuda{ours}0, {_WAY_OUT}."
            )
    return dali.__version__


def takes(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an image file that DALI decodes to the very pixels of Pillow (on the CPU; nvJPEG rounds otherwise); None for what is
    Pillow's to decode, or to refuse.

    JPEG and PNG only, whole to their last marker, of 8 bits a channel: 16 bits are rounded otherwise, or where they are grey, shown
    otherwise altogether; CMYK is equal on the CPU, and nvJPEG's was not compared; pictures of 1, 2 and 4 bits are hard edges, from which the two
    squashes make up to 32 levels of difference; interlaced and animated ones are rare, and were not compared. Others than JPEG and PNG,
    too: DALI knows no GIF, turns no TIFF as Pillow does, and refuses some WebP.
    """
    from PIL import Image

    try:
        with limits.guarded(), Image.open(BytesIO(data)) as image:
            kind = image.format
            if image.mode not in _MODES.get(kind, ()):
                return None
            if kind == "PNG":
                plain = not image.info.get("interlace") and not getattr(image, "is_animated", False)
                whole = data[-8:-4] == b"IEND" and data[_PNG_DEPTH] == 8
            else:
                plain, whole = is_usual_jpeg(data), data.endswith(b"\xff\xd9")
            return image.size if plain and whole else None
    except Exception:  # of whatever kind: what is wrong with it Pillow says when it decodes it
        return None


# A marker that has no place behind the first scan's header: all but a stuffed zero, restarts, a filling FF, tables, scans and the end.
_STRANGE = re.compile(rb"\xff[^\x00\xc4\xd0-\xd7\xd9\xda\xff]")
_SCAN = re.compile(rb"\xff\xda(?s:(.{14}))")


def is_usual_jpeg(data: bytes) -> bool:
    """Whether the headers of all scans of a JPEG say what they may, and between them is what belongs there. Else DALI may give what it has decoded until
    then, where Pillow refuses the file. May be False of a sound file; Pillow then decodes it."""
    first = data.find(b"\xff\xda")
    if first < 0 or _STRANGE.search(data, first):
        return False
    for scan in _SCAN.finditer(data, first):
        length, count = int.from_bytes(scan[1][:2], "big"), scan[1][2]
        if not 1 <= count <= 4 or length != 6 + 2 * count:
            return False
        start, end, bits = scan[1][3 + 2 * count :][:3]
        before, after = bits >> 4, bits & 15
        if start > end or end > 63 or after > 13 or before not in (0, after + 1):
            return False
    return True


def squash_on(device: torch.device, wish: Squash) -> By:
    """Who squashes: what is wished for; "auto" is Pillow on a CPU, and on a GPU our kernel, or DALI where the kernel does not serve.

    On a CPU DALI's resize takes three to four times as long as Pillow's (5.9 to 8.5 ms against 2.2, 480x320 to 224x224, one thread), and
    Pillow's gives Pillow's bits.
    """
    if wish not in ("auto", "pillow", "dali", "kernel"):
        raise FastidcError(f"squash is {wish!r}; one of auto, pillow, dali, kernel was expected.")
    if wish == "pillow" and device.type == "cuda":
        raise FastidcError("squash is 'pillow', which is for pixels on the host; on a GPU choose auto, dali or kernel.")
    if wish != "auto" or device.type != "cuda":
        return "pillow" if wish == "auto" else wish
    from fastidc.ops._dispatch import Spec, arch_of
    from fastidc.ops.squash import op

    return "dali" if op.explain(Spec("squash", "cuda", torch.uint8, False, arch_of(device)))["cuda"] else "kernel"


class Pipelines:
    """DALI pipelines, each lent to one thread at a time and built when all are out. A thread that calls `run` while another one does
    decodes beside it, which is how batches overlap.

    They run synchronously. DALI's own prefetching hands over batches by their place in a queue, and an error, or a run without input,
    moves every later batch by a place (seen in 2.4); here a run is one batch, with ids of its own, and who fails alone pays for it.
    """

    def __init__(self, size: int, device: torch.device, squash: By, threads: int, most: int):
        self.size, self.device, self.squash, self.threads, self.most = size, device, squash, threads, most
        self._idle: dict[int, list] = {}
        self._lock = threading.Lock()
        self._squashers = ThreadPoolExecutor(threads, "squash") if squash == "pillow" else None
        self._ids = itertools.count(0, most)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, samples: Sequence[Sequence[bytes]], out: Tensor) -> None:
        """Decodes and squashes the K encoded images of each of at most ``most`` samples into ``out``, uint8 [len(samples), K, size, size, 3] on
        the device. DaliError where DALI cannot, FastidcError where it gives back other samples than it was given."""
        count = len(samples[0])
        with self._lock:
            idle = self._idle.setdefault(count, [])
            pipeline, first = idle.pop() if idle else None, next(self._ids)
        ids = np.arange(first, first + len(samples), dtype=np.int64)
        try:
            pipeline = self._built(count) if pipeline is None else pipeline
            for k in range(count):
                pipeline.feed_input(f"image{k}", [np.frombuffer(sample[k], np.uint8) for sample in samples])
            pipeline.feed_input("id", ids[:, None])
            *images, came = pipeline.run()
            came = np.asarray(came.as_array()).ravel()
        except MemoryError:
            raise
        except Exception as error:  # DALI raises nearly every kind; the pipeline is not used again
            raise DaliError(_first_line(error)) from None
        if not np.array_equal(came, ids):
            raise FastidcError(f"DALI gave back samples {came[:4]} ... where {ids[:4]} ... were due; report it, {_WAY_OUT}.")
        with self.scope():
            for k, batch in enumerate(images):
                self._take(batch, out[:, k])
        with self._lock:
            self._idle[count].append(pipeline)  # not before its buffers are read: its next run writes to them

    @contextmanager
    def scope(self) -> Iterator[None]:
        """On a GPU: what is launched inside runs on a stream of our own, not behind the training step, and is done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def _built(self, count: int):
        """A pipeline of ``count`` outputs and the ids: uint8 [size, size, 3] a sample where DALI squashes, else pictures as they are."""
        from nvidia.dali import Pipeline, fn, types

        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.most,
            num_threads=self.threads,
            device_id=self.device.index if gpu else None,  # without a GPU None alone asks for no driver
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            outputs = []
            for k in range(count):
                encoded = fn.external_source(name=f"image{k}", batch=True)
                pixels = fn.decoders.image(
                    encoded,
                    device="mixed" if gpu else "cpu",  # nvJPEG; PNG is decoded on the host either way
                    output_type=types.RGB,
                    adjust_orientation=False,  # Pillow leaves EXIF's orientation alone
                )
                if self.squash == "dali":
                    pixels = fn.resize(pixels, resize_x=self.size, resize_y=self.size, interp_type=types.INTERP_CUBIC, antialias=True)
                outputs.append(pixels)
            pipeline.set_outputs(*outputs, fn.external_source(name="id", batch=True))
        pipeline.build()
        return pipeline

    def _take(self, batch, out: Tensor) -> None:
        """A pipeline's output into ``out``, uint8 [B, size, size, 3]. The pipeline's buffers are read, not kept."""
        from PIL import Image

        gpu = self._stream is not None
        if self._squashers is not None:
            pixels = out.numpy()

            def one(i: int) -> None:
                pixels[i] = to_array(Image.fromarray(np.asarray(batch.at(i))), self.size)

            list(self._squashers.map(one, range(len(batch))))
            return
        if self.squash == "dali":
            out.copy_(torch.from_dlpack(batch.as_tensor()) if gpu else torch.from_numpy(np.asarray(batch.as_array())))
            return
        from fastidc.ops.squash import squash

        pictures = [torch.from_dlpack(batch[i]) if gpu else torch.from_numpy(np.array(batch.at(i))) for i in range(len(batch))]
        out.copy_(squash(pictures, self.size))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
