"""Vocabulary projection and cross entropy in one call, so that a kernel may skip the logits."""

from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import linear_cross_entropy as reference


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, ignore_index: int = 0, backend: str = "auto"
) -> Tensor:
    """Mean over targets other than ``ignore_index`` of -log softmax(x W^T + b)[target].

    x [N, D], weight [V, D], bias [V], targets [N] int. Returns a scalar in fp32 (fp64 for fp64 inputs); 0 where every target is ignored.
    """
    run = op(Spec("linear_cross_entropy", x.device.type, x.dtype, x.requires_grad), backend)
    return run(x, weight, bias, targets, ignore_index)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    keep = targets != ignore_index
    if x.device.type == "cpu":  # rows without a target cost nothing; on CUDA the selection would wait for the device
        x, targets = x[keep], targets[keep]
    logits = F.linear(x, weight, bias)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return F.cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction="sum") / keep.sum().clamp(min=1)


op = Op(
    "linear_cross_entropy",
    [Backend("torch", _torch), Backend("reference", reference.linear_cross_entropy)],
    order=lambda spec: ("torch",),
)
