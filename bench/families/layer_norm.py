"""LayerNorm with and without the residual add before it, forward and backward; a block of the towers has it with."""

import torch

from bench import roofline
from bench.case import Case, Inputs, Variant
from bench.cases import Scale, of
from bench.ours import variants_of
from bench.peers import layer_norm as peers
from fastidc.reference import layer_norm as reference

ABOUT = "residual + LayerNorm; % of floor is % of the copy bandwidth"
BASELINES = ("add + F.layer_norm",)


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*shape, device, dtype) for shape in of("layer_norm", scale)]


def _case(name: str, rows: int, width: int, residual: bool, device: str, dtype: torch.dtype) -> Case:
    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator(device=device).manual_seed(seed)
        given = {name: torch.randn(rows, width, generator=draw, device=device).to(dtype) for name in ("x", "residual")[: 1 + residual]}
        given["weight"] = 1 + 0.1 * torch.randn(width, generator=draw, device=device)  # parameters stay fp32, as under autocast
        given["bias"] = 0.1 * torch.randn(width, generator=draw, device=device)
        return given

    return Case(
        family="layer_norm",
        name=f"{name} M={rows} C={width}" + (" residual" if residual else ""),
        shape={"rows": rows, "width": width, "residual": residual},
        device=device,
        dtype=dtype,
        make_inputs=inputs,
        exact=reference.layer_norm,
        plain=peers.add_and_norm,
        outputs=((rows, width),) * (1 + residual),
        gradients=("x", *(("residual",) if residual else ()), "weight", "bias"),
        floor=roofline.layer_norm(rows, width, residual=residual, size=dtype.itemsize),
    )


def variants(case: Case) -> list[Variant]:
    return [*variants_of("layer_norm", _ours, lambda case: {"head_dim": case.shape["width"]}), *peers.variants()]


def _ours(case: Case, backend: str):
    from fastidc import ops

    return lambda x, weight, bias, residual=None: ops.layer_norm(x, weight, bias, residual=residual, backend=backend)
