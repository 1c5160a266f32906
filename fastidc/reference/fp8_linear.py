"""A product of numbers rounded to eight bits, the specification."""

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """Each row of [R, C] as e4m3 holds it: divided by the least power of two that brings the row's largest number to 448 or below, rounded to
    the nearest of e4m3, and multiplied back. Rows of zeros stay; nothing is divided by less than 2^-100."""
    mantissa, exponent = torch.frexp(x.double().abs().amax(dim=1, keepdim=True) / 448)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-100)
    scale = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0, -100, exponent))
    return ((x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale).to(x.dtype)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = rounded(x) @ rounded(weight).T
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dx = rounded(grad) @ rounded(weight.T).T if wanted[0] else None
        return dx, grad.T @ x if wanted[1] else None, grad.sum(0) if wanted[2] else None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """q(x) q(W)^T + b with q = `rounded`: x by token, W by output channel. Its gradients are defined, not derived: dx = q(g) q(W^T)^T, where W
    is rounded by input channel because there the sum runs over the outputs; dW = g^T x and db = sum of g of the numbers as they are.

    x [..., K], weight [N, K], bias [N] -> [..., N].
    """
    return _FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
