"""The kernels of `fastidc_kernels.layer_norm` as registered ops, alone and before a product."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._dispatch import Spec
from fastidc.ops._triton import refusals
from fastidc.ops.fp8_linear import fp8_linear_bwd, fp8_linear_fwd
from fastidc_kernels import _tiles
from fastidc_kernels._launch import statistic


def unsupported(spec: Spec) -> list[str]:
    """Why the kernels cannot serve, in sentences. ``spec.head_dim`` is the rows' width."""
    out = pointwise_refusals(spec)
    if spec.head_dim > _tiles.WIDEST:
        out.append(f"a row may have {_tiles.WIDEST} numbers at most, not {spec.head_dim}.")
    return out


def pointwise_refusals(spec: Spec) -> list[str]:
    """Triton's refusals, but for the interpreter's of bf16: it is matrices that it multiplies wrongly, and here are none."""
    return refusals(spec._replace(dtype=torch.float16) if spec.dtype == torch.bfloat16 else spec)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float):
    """See `fastidc.ops.layer_norm`."""
    y, s, _, _ = layer_norm_fwd(x, residual, weight, bias, eps)
    return y if residual is None else (y, s)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fp8: bool,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `fastidc.ops.layer_norm.layer_norm_linear`; weight and bias have x's dtype. fp8: the product's."""
    out, s = _LayerNormLinear.apply(x, residual, norm_weight, norm_bias, weight, bias, eps, fp8)
    return out, x if residual is None else s


# ---- registered ops


@functools.cache
def _kernels():
    """Imported when first needed: importing fastidc imports no Triton."""
    from fastidc_kernels import layer_norm as kernels

    return kernels


def rows_of(x: Tensor | None) -> Tensor | None:
    """[..., C] -> [R, C] with the numbers of a row side by side, as the kernels read it."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("fastidc::layer_norm_fwd", mutates_args=())
def layer_norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the normalised tensor and s like x, s empty without a residual, and mean and rstd [rows]."""
    y, s, mean, rstd = _kernels().layer_norm_fwd(rows_of(x), rows_of(residual), weight.contiguous(), bias.contiguous(), eps)
    return y.view(x.shape), s if residual is None else s.view(x.shape), mean, rstd


@layer_norm_fwd.register_fake
def _(x, residual, weight, bias, eps):
    wide = statistic(x.dtype)
    rows = x.shape[:-1].numel()
    statistics = (x.new_empty(rows, dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape), *statistics


@torch.library.custom_op("fastidc::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    grad: Tensor,
    s_grad: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_weights: bool,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of s, those of weight and bias where ``of_weights``, and the normalised tensor where it is wanted ``again``; else empty."""
    bias = None if bias is None else bias.contiguous()
    given = (rows_of(grad), rows_of(s_grad), rows_of(s), mean, rstd, weight.contiguous(), bias)
    dx, dweight, dbias, y = _kernels().layer_norm_bwd(*given, of_weights, again)
    return dx.view(s.shape), dweight, dbias, y.view(s.shape) if again else y


@layer_norm_bwd.register_fake
def _(grad, s_grad, s, mean, rstd, weight, bias, of_weights, again):
    weights = (weight.new_empty(weight.shape if of_weights else (0,)) for _ in range(2))
    return s.new_empty(s.shape), *weights, s.new_empty(s.shape if again else (0,))


def _save(ctx, inputs, output):
    x, residual, weight, _, _ = inputs
    _, s, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *(() if residual is not None else (s,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else s, mean, rstd, weight)


def _gradient(ctx, grad, s_grad, *unused):
    if grad is None:
        return s_grad, s_grad, None, None, None
    of_x, of_residual, of_weight, of_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias, _ = layer_norm_bwd(grad, s_grad, *ctx.saved_tensors, None, of_weight or of_bias, False)
    return dx if of_x else None, dx if of_residual else None, dweight if of_weight else None, dbias if of_bias else None, None


layer_norm_fwd.register_autograd(_gradient, setup_context=_save)


class _LayerNormLinear(torch.autograd.Function):
    """A product of normalised rows that keeps s alone: its backward pass reads s anyway, and writes the rows once more on the way."""

    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, weight, bias, eps, fp8):
        y, s, mean, rstd = layer_norm_fwd(x, residual, norm_weight, norm_bias, eps)
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.mark_non_differentiable(s)
        ctx.save_for_backward(x if residual is None else s, mean, rstd, norm_weight, norm_bias, weight)
        ctx.fp8 = fp8
        return (fp8_linear_fwd if fp8 else F.linear)(y, weight, bias), s

    @staticmethod
    def backward(ctx, grad, s_grad):
        of_x, of_residual, *of_norm, of_weight, of_bias, _, _ = ctx.needs_input_grad
        if grad is None:
            return s_grad, s_grad if of_residual else None, None, None, None, None, None, None
        s, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        y_grad = (fp8_linear_bwd(rows, weight) if ctx.fp8 else rows @ weight).view_as(s)
        dx, dnorm, dnorm_bias, y = layer_norm_bwd(y_grad, s_grad, s, mean, rstd, norm_weight, norm_bias, any(of_norm), of_weight)
        dweight = rows.T @ y.view(-1, y.shape[-1]) if of_weight else None
        norms = (found if wanted else None for found, wanted in zip((dnorm, dnorm_bias), of_norm, strict=True))
        return dx if of_x else None, dx if of_residual else None, *norms, dweight, rows.sum(0) if of_bias else None, None, None
