"""A linear layer with its gradients, in bf16 and in FP8: three products each, of which FP8 has two, and the quantising of their operands."""

import torch
from torch.nn import functional as F

from bench.case import Case, Inputs, Variant
from bench.cases import Scale, of
from bench.roofline import Floor, Work
from fastidc.reference import fp8_linear as reference

ABOUT = "products of the blocks, forward and backward; the floor is bf16's, so that FP8 may lie beyond 100%"
BASELINES = ("F.linear",)


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*shape, device, dtype) for shape in of("products", scale)]


def _case(name: str, rows: int, inner: int, outer: int, device: str, dtype: torch.dtype) -> Case:
    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator(device=device).manual_seed(seed)
        shapes = {"x": (rows, inner), "weight": (outer, inner), "bias": (outer,)}
        scales = {"x": 1.0, "weight": inner**-0.5, "bias": 0.1}
        return {key: (scales[key] * torch.randn(shape, generator=draw, device=device)).to(dtype) for key, shape in shapes.items()}

    size = dtype.itemsize
    product = Work(2.0 * rows * inner * outer, (rows * (inner + outer) + inner * outer) * size)
    return Case(
        family="products",
        name=f"{name} M={rows} K={inner} N={outer}",
        shape={"rows": rows, "inner": inner, "outer": outer},
        device=device,
        dtype=dtype,
        make_inputs=inputs,
        exact=F.linear,
        plain=F.linear,
        outputs=((rows, outer),),
        gradients=("x", "weight", "bias"),
        floor=Floor((product,), (product, product)),
    )


def variants(case: Case) -> list[Variant]:
    return [
        Variant("F.linear", lambda case: F.linear),
        # other numbers on purpose: it is held to its own specification
        Variant("fastidc FP8", _fp8, _fp8_refuses, ours=True, exact=reference.fp8_linear),
    ]


def _fp8(case: Case):
    from fastidc import ops

    return ops.fp8_linear


def _fp8_refuses(case: Case) -> list[str]:
    from fastidc.ops.fp8_linear import unsupported

    if case.device == "cpu" and case.shape["rows"] > 64:  # the tiny shape shows that it runs
        return ["FP8 products are for a CUDA device of compute capability 8.9 or higher; a CPU emulates them."]
    half = ["FP8 products give bf16 or fp32, not fp16."] if case.dtype == torch.float16 else []
    return [*unsupported(torch.device(case.device)), *half]
