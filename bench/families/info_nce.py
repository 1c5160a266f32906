"""Symmetric InfoNCE of one process: features that are not normalised in, the loss and all gradients out."""

import math

import torch

from bench import exact, roofline
from bench.case import Case, Inputs, Variant
from bench.cases import Scale, of
from bench.ours import variants_of
from bench.peers import info_nce as peers

ABOUT = "the contrastive loss over B x B; % of floor counts 4 products, each score computed twice and never stored"
BASELINES = ("open_clip order",)


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*shape, device, dtype) for shape in of("info_nce", scale)]


def _case(batch: int, width: int, gradients: bool, device: str, dtype: torch.dtype) -> Case:
    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator(device=device).manual_seed(seed)
        text, noise = (torch.randn(batch, width, generator=draw, device=device) for _ in range(2))
        # barely alike, so that the loss is far from 0: at 0 every relative error is rounding
        scale = torch.tensor(math.log(100.0), device=device)  # where OpenAI's weights stand, fp32 as every recipe keeps it
        return {"text": text.to(dtype), "pair": (0.1 * text + noise).to(dtype), "logit_scale": scale}

    return Case(
        family="info_nce",
        name=f"B={batch} D={width}" + ("" if gradients else " loss only"),
        shape={"batch": batch, "width": width},
        device=device,
        dtype=dtype,
        make_inputs=inputs,
        exact=exact.info_nce,
        plain=exact.info_nce,
        outputs=((),),
        gradients=("text", "pair", "logit_scale") if gradients else (),
        floor=roofline.info_nce(batch, width, dtype.itemsize),
        items=("pairs", batch),
    )


def variants(case: Case) -> list[Variant]:
    return [*variants_of("info_nce", _ours), *peers.variants()]


def _ours(case: Case, backend: str):
    from fastidc import ops

    return lambda text, pair, logit_scale: ops.info_nce(text, pair, logit_scale, backend=backend)
