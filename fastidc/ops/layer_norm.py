"""Layer normalisation with an optional residual, alone and before a product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops import _layer_norm_triton as triton_backend
from fastidc.ops._dispatch import Backend, Op, Spec, _constant, arch_of, chosen_for
from fastidc.ops.fp8_linear import autocast_dtype, in_fp8, linear
from fastidc.reference import layer_norm as reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5, backend: str = "auto"):
    """Normalises s = x + residual over its last dimension.

    x, residual [..., C] of one dtype; weight, bias [C]. Returns the normalised tensor in x's dtype and, where a residual is given, s as well,
    rounded to that dtype before it is normalised. Statistics are taken in fp32 (fp64 for fp64 inputs). ValueError, in sentences, for tensors
    that do not fit and where ``backend`` cannot serve. The kernels keep s and two numbers a row for their backward pass, of which there is no
    gradient again.
    """
    _check(x, weight, bias, residual)
    run = op(_spec(x, weight, bias, residual), _while_compiling(backend))
    return run(x, weight, bias, residual, eps)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
    fp8_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """F.linear(normalised, weight, bias) and s: `layer_norm` before a product. x [..., C], weight [D, C], bias [D] or None -> [..., D] and
    s = x + residual, x itself where there is none.

    Where the kernels serve, the normalised tensor is not kept for the weight's gradient but made once more in the pass that makes x's.
    ``fp8_rows``: see `fastidc.ops.fp8_linear.in_fp8`.
    """
    _check(x, norm_weight, norm_bias, residual)
    served_by = op.serving(_spec(x, norm_weight, norm_bias, residual), _while_compiling(backend))
    if fused(x, served_by):
        product = (*as_product(x, weight, bias), in_fp8(x, fp8_rows))
        return triton_backend.layer_norm_linear(x, norm_weight, norm_bias, *product, residual, eps)
    found = op.backends[served_by].run(x, norm_weight, norm_bias, residual, eps)
    normalised, s = (found, x) if residual is None else found
    return linear(normalised, weight, bias, fp8_rows), s


def fused(x: Tensor, served_by: str) -> bool:
    """Whether what is before a product is part of it: where the kernels serve. Not within torch.compile, which decides itself what it keeps,
    and not where autocast would have the product in another dtype."""
    return served_by == "triton" and not torch.compiler.is_compiling() and (autocast_dtype(x) or x.dtype) == x.dtype


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as autocast would cast them for their product with x; out here, where the casts have gradients."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return weight, bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _while_compiling(backend: str) -> str:
    """In a graph of torch.compile "auto" is torch's: the compiler makes one kernel of the statistics and of what stands beside them, such as
    dropout, where an op of ours is a wall."""
    return _torch_unless_chosen("layer_norm", backend) if torch.compiler.is_compiling() else backend


@_constant
def _torch_unless_chosen(name: str, backend: str) -> str:
    chosen = chosen_for(name, backend)
    return "torch" if chosen == "auto" else chosen


def _spec(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Spec:
    wanted = x.requires_grad or weight.requires_grad or bias.requires_grad or (residual is not None and residual.requires_grad)
    return Spec("layer_norm", x.device.type, x.dtype, torch.is_grad_enabled() and wanted, arch_of(x.device), head_dim=x.shape[-1])


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [..., C] with C at least 1, got {x.dtype} {list(x.shape)}.")
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:] or weight.dtype != bias.dtype:
        raise ValueError(
            f"weight and bias must both be [{x.shape[-1]}] and of one dtype, got {weight.dtype} {list(weight.shape)} and {bias.dtype} {list(bias.shape)}."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual must be as x is, {x.dtype} {list(x.shape)} on {x.device}, got {residual.dtype} {list(residual.shape)} on {residual.device}."
        )


def _torch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float):
    s = x if residual is None else x + residual
    wide = s.float() if s.dtype.itemsize < 4 else s
    normalised = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(s.dtype)
    return normalised if residual is None else (normalised, s)


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: on CUDA the kernels go first, one pass over memory each way where torch has an add, casts and a norm, and
    two more kernels for the gradients of weight and bias. On a CPU torch's."""
    return ("triton", "torch") if spec.device == "cuda" else ("torch", "triton")


op = Op(
    "layer_norm",
    [
        Backend("triton", triton_backend.layer_norm, triton_backend.unsupported),
        Backend("torch", _torch),
        Backend("reference", reference.layer_norm),
    ],
    order=_order,
)
