"""Decoding and resizing: Pillow in threads and DALI's pipelines (ours), Pillow in worker processes, torchvision on the host and on the GPU,
DALI as its manual has it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.case import Case, Variant
from bench.peers.cached import CORES, threads_said

WORKERS = 4  # of the official command line


def variants() -> list[Variant]:
    counts, few, ours = sorted({WORKERS, CORES} - {1}), sorted({1, CORES}), {"ours": True, "needs": ("nvidia.dali",)}
    return [
        Variant("Pillow, 1 thread", lambda case: _one_by_one(case)),
        *(Variant(f"fastidc, {n} threads", lambda case, n=n: _threads(case, n), ours=True) for n in counts),
        Variant(f"DataLoader, {WORKERS} workers", _data_loader),
        *(Variant(f"fastidc DALI, {threads_said(n)}", lambda case, n=n: _pipelines(case, n, "dali"), **ours) for n in few),
        *(
            Variant(f"fastidc DALI + Pillow's squash, {threads_said(n)}", lambda case, n=n: _pipelines(case, n, "pillow"), _host, **ours)
            for n in few
        ),
        Variant("fastidc DALI + squash kernel", lambda case: _pipelines(case, CORES, "kernel"), _kernel, **ours),
        *(
            Variant(f"torchvision on the host, {threads_said(n)}", lambda case, n=n: _torchvision_host(case, n), needs=("torchvision",))
            for n in (1, WORKERS)
        ),
        Variant("torchvision nvJPEG", _torchvision_gpu, _jpeg_on_cuda, needs=("torchvision",)),
        Variant("DALI, its own reader", _dali, _cuda, needs=("nvidia.dali",)),
    ]


def _cuda(case: Case) -> list[str]:
    return [] if case.device == "cuda" else ["it is measured with its GPU pipeline, on CUDA only."]


def _host(case: Case) -> list[str]:
    return ["its pixels are on the GPU, where Pillow does not reach."] if case.device == "cuda" else []


def _kernel(case: Case) -> list[str]:
    """On a CPU it is a reference for tests, far slower than any of these."""
    if refusals := _cuda(case):
        return refusals
    from fastidc.ops._dispatch import Spec, arch_of
    from fastidc.ops.squash import op

    return op.explain(Spec("squash", "cuda", torch.uint8, False, arch_of(torch.device("cuda"))))["cuda"]


def _jpeg_on_cuda(case: Case) -> list[str]:
    return _cuda(case) + ([] if case.shape["kind"] == "jpeg" else ["it decodes JPEG only."])


def pillow(path: str, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: RGB, squashed by Pillow's bicubic filter."""
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def _one_by_one(case: Case):
    return lambda paths, side: torch.from_numpy(np.stack([pillow(path, side) for path in paths])).to(case.device)


def _threads(case: Case, workers: int):
    """`fastidc.data.images.decode` in a pool of threads, as `fastidc.data.loaders.prefetch` runs it."""
    from fastidc.data.images import decode

    pool = ThreadPoolExecutor(workers)
    return lambda paths, side: torch.from_numpy(np.stack(list(pool.map(lambda p: decode(p, side), paths)))).to(case.device)


def _pipelines(case: Case, threads: int, squash: str):
    """`fastidc.data.dali.DaliImages`, which decodes JPEG by nvJPEG on CUDA and leaves the batch there; all files of a call are one batch."""
    from fastidc.data.dali import DaliImages

    pool, kept = ThreadPoolExecutor(threads), {}

    def run(paths: tuple[str, ...], side: int) -> Tensor:
        if side not in kept:
            kept[side] = DaliImages(side, case.device, squash, threads)
        return kept[side].start([[Path(path)] for path in paths], pool)()[:, 0]

    return run


class _Files(torch.utils.data.Dataset):
    def __init__(self):
        self.paths: tuple[str, ...] = ()
        self.side = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(pillow(self.paths[index], self.side))


def _data_loader(case: Case):
    """torch's own loader with processes that stay between epochs; a call is one epoch in four batches."""
    kept: dict[tuple, torch.utils.data.DataLoader] = {}

    def run(paths: tuple[str, ...], side: int) -> Tensor:
        if (paths, side) not in kept:
            files = _Files()
            files.paths, files.side = paths, side
            size = max(1, len(paths) // 4)
            kept[paths, side] = torch.utils.data.DataLoader(
                files, size, num_workers=WORKERS, persistent_workers=True, pin_memory=case.device == "cuda"
            )
        return torch.cat([batch.to(case.device, non_blocking=True) for batch in kept[paths, side]])

    return run


def _resize(images: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, H, W] -> uint8 [N, side, side, 3]"""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    return resize(images, [side, side], InterpolationMode.BICUBIC, antialias=True).permute(0, 2, 3, 1).contiguous()


def _torchvision_host(case: Case, workers: int):
    from torchvision.io import ImageReadMode, decode_image, read_file

    pool = ThreadPoolExecutor(workers)

    def one(path: str, side: int) -> Tensor:
        return _resize(decode_image(read_file(path), ImageReadMode.RGB)[None], side)

    return lambda paths, side: torch.cat(list(pool.map(lambda p: one(p, side), paths))).to(case.device)


def _torchvision_gpu(case: Case):
    """One fused call for all files of a batch; they are alike in size, so one resize does for all too."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    pool = ThreadPoolExecutor(WORKERS)

    def run(paths: tuple[str, ...], side: int) -> Tensor:
        return _resize(torch.stack(decode_jpeg(list(pool.map(read_file, paths)), ImageReadMode.RGB, device="cuda")), side)

    return run


def _dali(case: Case):
    from nvidia.dali import fn, pipeline_def, types

    kept = {}

    def built(paths: tuple[str, ...], side: int):
        @pipeline_def(batch_size=len(paths), num_threads=CORES, device_id=0)
        def graph():
            encoded, _ = fn.readers.file(files=list(paths), random_shuffle=False)
            pixels = fn.decoders.image(encoded, device="mixed", output_type=types.RGB)
            return fn.resize(pixels, resize_x=side, resize_y=side, interp_type=types.INTERP_CUBIC, antialias=True)

        made = graph()
        made.build()
        return made

    def run(paths: tuple[str, ...], side: int) -> Tensor:
        if (paths, side) not in kept:
            kept[paths, side] = built(paths, side)
        (out,) = kept[paths, side].run()
        return torch.from_dlpack(out.as_tensor()).clone()  # the pipeline takes its buffer back

    return run
