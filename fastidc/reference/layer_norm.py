"""Layer normalisation with an optional residual, the specification."""

from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5):
    """(s - mean) / sqrt(var + eps) * weight + bias over the last dimension, biased variance, s = x + residual.

    x, residual [..., C]; weight, bias [C]. Returns the normalised tensor, and s as well where a residual is given.
    """
    s = x if residual is None else x + residual
    centred = s - s.mean(dim=-1, keepdim=True)
    normalised = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias
    return normalised if residual is None else (normalised, s)
