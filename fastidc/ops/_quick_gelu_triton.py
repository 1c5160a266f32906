"""The kernels of `fastidc_kernels.quick_gelu` as registered ops, alone and before a product."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._layer_norm_triton import pointwise_refusals as unsupported
from fastidc.ops._layer_norm_triton import rows_of
from fastidc.ops.fp8_linear import fp8_linear_bwd, fp8_linear_fwd

__all__ = ["quick_gelu", "quick_gelu_linear", "unsupported"]


def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """See `fastidc.ops.quick_gelu`."""
    return quick_gelu_fwd(x, bias)


def quick_gelu_linear(x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor | None, fp8: bool) -> Tensor:
    """See `fastidc.ops.quick_gelu.quick_gelu_linear`; weight and bias have x's dtype. fp8: the product's."""
    return _QuickGELULinear.apply(x, x_bias, weight, bias, fp8)


# ---- registered ops


@functools.cache
def _kernels():
    """Imported when first needed: importing fastidc imports no Triton."""
    from fastidc_kernels import quick_gelu as kernels

    return kernels


@torch.library.custom_op("fastidc::quick_gelu_fwd", mutates_args=())
def quick_gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels().quick_gelu_fwd(rows_of(x), None if bias is None else bias.contiguous()).view(x.shape)


@quick_gelu_fwd.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastidc::quick_gelu_bwd", mutates_args=())
def quick_gelu_bwd(grad: Tensor, x: Tensor, bias: Tensor | None, of_bias: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, that of the bias where ``of_bias``, and the forward pass's result where it is wanted ``again``; else empty."""
    dx, dbias, y = _kernels().quick_gelu_bwd(rows_of(grad), rows_of(x), None if bias is None else bias.contiguous(), of_bias, again)
    return dx.view(x.shape), dbias, y.view(x.shape) if again else y


@quick_gelu_bwd.register_fake
def _(grad, x, bias, of_bias, again):
    dbias = (x if bias is None else bias).new_empty(x.shape[-1] if of_bias else 0)
    return x.new_empty(x.shape), dbias, x.new_empty(x.shape if again else (0,))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):
    of_x, of_bias = ctx.needs_input_grad
    dx, dbias, _ = quick_gelu_bwd(grad, *ctx.saved_tensors, of_bias, False)
    return dx if of_x else None, dbias if of_bias else None


quick_gelu_fwd.register_autograd(_gradient, setup_context=_save)


class _QuickGELULinear(torch.autograd.Function):
    """A product of activations that keeps what they were made of: its backward pass reads that anyway, and writes them once more on the way."""

    @staticmethod
    def forward(ctx, x, x_bias, weight, bias, fp8):
        ctx.save_for_backward(x, x_bias, weight)
        ctx.fp8 = fp8
        return (fp8_linear_fwd if fp8 else F.linear)(quick_gelu_fwd(x, x_bias), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, x_bias, weight = ctx.saved_tensors
        of_x, of_x_bias, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dweight = dx = dx_bias = None
        if of_x or of_x_bias or of_weight:
            y_grad = (fp8_linear_bwd(rows, weight) if ctx.fp8 else rows @ weight).view_as(x)
            dx, dx_bias, y = quick_gelu_bwd(y_grad, x, x_bias, of_x_bias, of_weight)
            dweight = rows.T @ y.view(-1, y.shape[-1]) if of_weight else None
        return dx if of_x else None, dx_bias if of_x_bias else None, dweight, rows.sum(0) if of_bias else None, None
