"""The captioner's head: rows times the word table, and the mean cross entropy over the rows that have a target."""

import torch

from bench import exact, roofline
from bench.case import Case, Inputs, Variant
from bench.cases import Scale, VocabularyShape, of
from bench.ours import variants_of
from bench.peers import linear_cross_entropy as peers
from fastidc.config import PAD_ID

ABOUT = "vocabulary projection and cross entropy; % of floor counts 2 to 4 products and no logit in memory"
BASELINES = ("F.linear + F.cross_entropy",)


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(shape, device, dtype) for shape in of("vocabulary", scale)]


def _case(shape: VocabularyShape, device: str, dtype: torch.dtype) -> Case:
    real = round(shape.rows * shape.real)

    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(shape.rows, shape.width, generator=draw, device=device)
        weight = torch.randn(shape.vocabulary, shape.width, generator=draw, device=device) * shape.width**-0.5
        bias = 0.1 * torch.randn(shape.vocabulary, generator=draw, device=device)
        targets = torch.randint(1, shape.vocabulary, (shape.rows,), generator=draw, device=device)
        targets[torch.randperm(shape.rows, generator=draw, device=device)[real:]] = PAD_ID
        bias = bias if shape.bias else torch.zeros_like(bias)
        return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype), "targets": targets}

    return Case(
        family="linear_cross_entropy",
        name=f"{shape.name} V={shape.vocabulary}",
        shape={"rows": shape.rows, "real": real, "width": shape.width, "vocabulary": shape.vocabulary, "bias": shape.bias},
        device=device,
        dtype=dtype,
        make_inputs=inputs,
        exact=exact.linear_cross_entropy,
        plain=exact.linear_cross_entropy,
        outputs=((),),
        gradients=("x", *(("weight",) if shape.trained else ()), *(("bias",) if shape.bias else ())),
        # rows without a target need nothing, whoever computes them
        floor=roofline.linear_cross_entropy(
            real, shape.vocabulary, shape.width, trained=shape.trained, bias=shape.bias, size=dtype.itemsize
        ),
        items=("tokens", real),
    )


def variants(case: Case) -> list[Variant]:
    return [*variants_of("linear_cross_entropy", _ours, lambda case: {"head_dim": case.shape["width"]}), *peers.variants()]


def _ours(case: Case, backend: str):
    from fastidc import ops

    return lambda x, weight, bias, targets: ops.linear_cross_entropy(x, weight, bias, targets, ignore_index=PAD_ID, backend=backend)
