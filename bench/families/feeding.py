"""Whole training steps fed by a loader that reads a cache, against the same steps on one batch that is on the device already: what loading costs.

Everything a run does to a batch is in: drawing samples and captions, tokens, the gather, packing, the way to the device. The cache holds
pictures of soft shapes many times over; sentences are a few dozen. The gate compares the pixels that a model would read with the cache's.
"""

import itertools
from collections.abc import Callable

import torch

from bench.case import Case, Variant, Verdict
from bench.cases import FeedingShape, Scale, of
from bench.families import steps
from bench.peers import fed

ABOUT = "training steps fed by a loader against steps on one batch that is there already; pairs/s on CUDA, ratios on a CPU"
BASELINES = ("one batch",)
SETTINGS = {
    "paper": {"seconds": 6.0, "least": 5, "most": 10, "warm_up": 3},
    "cpu": {"seconds": 60.0, "least": 3, "most": 5, "warm_up": 1},
    "smoke": {"seconds": 1.0, "least": 3, "most": 3, "warm_up": 1},
}
CALLS = 8  # steps in a lap, so that what a loader has ready before it is a small share


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(shape, device, dtype) for shape in of("feeding", scale)]


def _case(shape: FeedingShape, device: str, dtype: torch.dtype) -> Case:
    pairs = 1 if shape.stage == "adapt" else 2
    return Case(
        family="feeding",
        name=f"{shape.name} {shape.stage} B={shape.samples}",
        shape={"config": shape.config, "stage": shape.stage, "samples": shape.samples, "images": shape.images},
        device=device,
        dtype=dtype,
        make_inputs=lambda device, dtype, seed: {},
        mode="step",
        check=check,
        wall=True,
        calls=CALLS if device == "cuda" else 1,
        items=("pairs", shape.samples * pairs),
    )


def variants(case: Case) -> list[Variant]:
    return [
        Variant("one batch", lambda case: _step(case, None)),
        *(Variant(f"fastidc {loader}", lambda case, loader=loader: _step(case, loader), ours=True) for loader in fed.LOADERS),
    ]


def _step(case: Case, loader: str | None) -> Callable[[], object]:
    """A step on the next batch of ``loader``, for ever; without one on the first batch of a loader, over and over."""
    config, stage = case.shape["config"], case.shape["stage"]
    stepper = steps.build("fastidc", config, stage, case.device, case.dtype)
    batches = fed.batches(case, loader or "resident")
    if loader is None:
        batches = itertools.repeat(stepper.prepare(next(batches)))
        return lambda: stepper.step(next(batches))
    return lambda: stepper.step(stepper.prepare(next(batches)))


def check(case: Case, variant: Variant, function) -> Verdict:
    loader = variant.name.removeprefix("fastidc ")
    wrong = fed.wrong_pixels(case, loader if loader in fed.LOADERS else "resident")
    return Verdict(float(wrong), 0.0, "pixels that are not the cache's")
