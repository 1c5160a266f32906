"""Layer normalisation with an optional residual."""

from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import layer_norm as reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5, backend: str = "auto"):
    """Normalises s = x + residual over its last dimension.

    x, residual [..., C]; weight, bias [C]. Returns the normalised tensor in x's dtype and, where a residual is given, s as well.
    Statistics are taken in fp32 (fp64 for fp64 inputs).
    """
    run = op(Spec("layer_norm", x.device.type, x.dtype, x.requires_grad), backend)
    return run(x, weight, bias, residual, eps)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float):
    s = x if residual is None else x + residual
    wide = s.float() if s.dtype.itemsize < 4 else s
    normalised = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(s.dtype)
    return normalised if residual is None else (normalised, s)


op = Op("layer_norm", [Backend("torch", _torch), Backend("reference", reference.layer_norm)], order=lambda spec: ("torch",))
