"""CLIP's activation."""

from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import quick_gelu as reference


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y sigmoid(1.702 y) with y = x + bias; x [..., C], bias [C] or None. Returns x's shape and dtype."""
    run = op(Spec("quick_gelu", x.device.type, x.dtype, x.requires_grad), backend)
    return run(x, bias)


def _torch(x: Tensor, bias: Tensor | None) -> Tensor:
    # y sigmoid(a y) = silu(a y) / a: silu has one kernel each way and keeps one tensor for its backward
    return F.silu(1.702 * (x if bias is None else x + bias)) / 1.702


op = Op("quick_gelu", [Backend("torch", _torch), Backend("reference", reference.quick_gelu)], order=lambda spec: ("torch",))
