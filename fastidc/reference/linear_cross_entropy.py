"""Vocabulary projection and cross entropy, the specification."""

from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int = 0) -> Tensor:
    """Mean over targets other than ``ignore_index`` of -log softmax(x W^T + b)[target].

    x [N, D], weight [V, D], bias [V], targets [N] int -> scalar; 0 where every target is ignored.
    """
    logits = F.linear(x, weight, bias)
    kept = (targets != ignore_index).sum().clamp(min=1)
    return F.cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction="sum") / kept
