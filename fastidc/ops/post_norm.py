"""LayerNorm whose result goes on twice, as in post-LN layers: into a product, and as it is into the next sum."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._layer_norm_triton import layer_norm_bwd, layer_norm_fwd
from fastidc.ops.fp8_linear import fp8_linear_bwd, fp8_linear_fwd, in_fp8, linear
from fastidc.ops.layer_norm import _check, _spec, _while_compiling, as_product, fused, op


def post_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
    fp8_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """F.linear(normalised, weight, bias) and the normalised s = x + residual. Shapes, errors and ``backend`` are `layer_norm_linear`'s, which
    returns s beside the product.

    Where the kernels serve, nothing but s is kept: the normalised rows, which the weight's gradient reads, are made once more in the pass that
    makes x's, and the gradient that comes to them from the next sum is added within the product that makes the other.
    """
    _check(x, norm_weight, norm_bias, residual)
    served_by = op.serving(_spec(x, norm_weight, norm_bias, residual), _while_compiling(backend))
    if fused(x, served_by):
        product = (*as_product(x, weight, bias), in_fp8(x, fp8_rows))
        return _PostNormLinear.apply(x, residual, norm_weight, norm_bias, *product, eps)
    normalised, _ = op.backends[served_by].run(x, norm_weight, norm_bias, residual, eps)
    return linear(normalised, weight, bias, fp8_rows), normalised


class _PostNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, weight, bias, fp8, eps):
        y, s, mean, rstd = layer_norm_fwd(x, residual, norm_weight, norm_bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, mean, rstd, norm_weight, norm_bias, weight)
        ctx.fp8 = fp8
        return (fp8_linear_fwd if fp8 else F.linear)(y, weight, bias), y

    @staticmethod
    def backward(ctx, grad, y_grad):
        of_x, of_residual, *of_norm, of_weight, of_bias, _, _ = ctx.needs_input_grad
        if grad is None and y_grad is None:
            return (None,) * 8
        s, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        rows = None if grad is None else grad.reshape(-1, grad.shape[-1])
        y_rows = None if y_grad is None else y_grad.reshape(-1, y_grad.shape[-1])
        if rows is None:
            total = y_rows
        elif ctx.fp8:
            total = fp8_linear_bwd(rows, weight) if y_rows is None else fp8_linear_bwd(rows, weight) + y_rows
        else:
            total = rows @ weight if y_rows is None else torch.addmm(y_rows, rows, weight)
        again = of_weight and rows is not None
        dx, dnorm, dnorm_bias, y = layer_norm_bwd(total.view_as(s), None, s, mean, rstd, norm_weight, norm_bias, any(of_norm), again)
        dweight = rows.T @ y.view(-1, y.shape[-1]) if again else None
        dbias = rows.sum(0) if of_bias and rows is not None else None
        norms = (found if wanted else None for found, wanted in zip((dnorm, dnorm_bias), of_norm, strict=True))
        return dx if of_x else None, dx if of_residual else None, *norms, dweight, dbias, None, None
