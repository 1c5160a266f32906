"""CLIP's activation, the specification."""

from torch import Tensor


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y sigmoid(1.702 y) with y = x + bias; x [..., C], bias [C]."""
    y = x if bias is None else x + bias
    return y * (1.702 * y).sigmoid()
