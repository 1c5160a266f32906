"""The captioner's activation before a product, with nothing kept but what it was made of."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops.fp8_linear import autocast_dtype, fp8_linear_bwd, fp8_linear_fwd, in_fp8, linear
from fastidc.ops.layer_norm import as_product


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, fp8_rows: int | None = None) -> Tensor:
    """F.linear(gelu(x), weight, bias) with the exact (erf) GELU: x [..., C], weight [D, C], bias [D] or None -> [..., D].

    GELU's gradient reads x; the activations, which the weight's gradient reads, are made from it once more instead of being kept beside it. Not
    within torch.compile, which decides itself what it keeps, and not where autocast would have the product in another dtype than x's.
    ``fp8_rows``: see `fastidc.ops.fp8_linear.in_fp8`.
    """
    wanted = torch.is_grad_enabled() and weight.requires_grad
    if not wanted or torch.compiler.is_compiling() or (autocast_dtype(x) or x.dtype) != x.dtype:
        return linear(F.gelu(x), weight, bias, fp8_rows)
    return _GELULinear.apply(x, *as_product(x, weight, bias), in_fp8(x, fp8_rows))


class _GELULinear(torch.autograd.Function):
    """A product of activations that keeps what they were made of."""

    @staticmethod
    def forward(ctx, x, weight, bias, fp8):
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        return (fp8_linear_fwd if fp8 else F.linear)(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows, dx, dweight = grad.reshape(-1, grad.shape[-1]), None, None
        if of_weight:  # first: its activations are gone again when x's gradient is made
            dweight = rows.T @ F.gelu(x).reshape(-1, x.shape[-1])
        if of_x:
            dx = torch.ops.aten.gelu_backward((fp8_linear_bwd(rows, weight) if ctx.fp8 else rows @ weight).view_as(x), x)
        return dx, dweight, rows.sum(0) if of_bias else None, None
