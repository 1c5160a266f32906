"""Image files -> uint8 [N, 224, 224, 3] on the device: decoding and bicubic resizing, from a warm page cache, and a cache of the same images
(`fastidc.data.cache`): 2,048 rows in a shuffled order, warm but where a row says "cold", which has the rows of every call forgotten first.
"cache build" is the whole build, with a worker a thread, on the host whatever the device.

The gate's truth is Pillow's, whose bicubic filter the official code uses. Another decoder rounds otherwise and another resampler weighs
otherwise, so its limit is a relative norm of 3%: enough for both, far from a wrong filter or a swapped channel. "fastidc DALI" squashes as
DALI does, on either device; with Pillow's squash it is for the host, with our kernel's for CUDA.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.case import Case, Inputs, Variant, Verdict
from bench.cases import Scale, of
from bench.gate import relative
from bench.peers import cached
from bench.peers import loader as peers

ABOUT = "image files -> uint8 pixels on the device; images/s on CUDA, ratios on a CPU"
BASELINES = ("Pillow, 1 thread",)
LIMIT = 0.03
SETTINGS = {"paper": {"seconds": 8.0, "least": 3, "most": 10, "warm_up": 1}, "smoke": {"least": 3, "most": 3, "warm_up": 1}}
DTYPES = (torch.float32,)  # of nothing here: pixels are uint8
SIDE = 224
BUILT = 128  # images of a build: enough for its end, when they are brought to the disk, to be a small share


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    shapes = of("loader", scale)
    kind, count, width, height = shapes[0]
    together = count if scale == "smoke" else BUILT
    return [*(_case(*shape, device) for shape in shapes), _case(kind, together, width, height, "cpu", build=True)]


def _case(kind: str, count: int, width: int, height: int, device: str, build: bool = False) -> Case:
    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        return {"paths": files(kind, count, width, height), "side": SIDE}

    return Case(
        family="loader",
        name=f"{'cache build, ' * build}{kind} {width}x{height} N={count}",
        shape={"kind": kind, "count": count, "build": build},
        device=device,
        dtype=torch.float32,
        make_inputs=inputs,
        check=check,
        wall=True,
        # a loader may decode ahead while another one is being timed: a lap of several calls keeps that a small share
        calls=4 if device == "cuda" else 1,
        items=("images", count),
    )


@functools.cache
def files(kind: str, count: int, width: int, height: int) -> tuple[str, ...]:
    """As many pictures of soft shapes and a little noise, which compress about as a rendered scene does; removed at exit."""
    from PIL import Image

    folder = Path(tempfile.mkdtemp(prefix="fastidc-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    draw = np.random.default_rng(0)
    names = []
    for number in range(count):
        soft = Image.fromarray(draw.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(soft, dtype=np.int16) + draw.integers(-2, 3, (height, width, 1), dtype=np.int16)
        names.append(str(folder / f"{number:05d}.{kind}"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(names[-1], **({"quality": 95} if kind == "jpeg" else {}))
    return tuple(names)


def variants(case: Case) -> list[Variant]:
    return cached.build_variants() if case.shape["build"] else [*peers.variants(), *cached.variants()]


def check(case: Case, variant: Variant, function) -> Verdict:
    inputs = case.make_inputs(case.device, case.dtype, 0)
    truth = torch.stack([torch.from_numpy(peers.pillow(path, SIDE)) for path in inputs["paths"]])
    found = function(**inputs)
    if found.dtype != torch.uint8:
        return Verdict(float("nan"), LIMIT, f"pixels, which are {found.dtype}")
    return Verdict(relative(found.cpu(), truth), LIMIT, "pixels")
