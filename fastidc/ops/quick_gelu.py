"""CLIP's activation, alone and before a product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops import _quick_gelu_triton as triton_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of
from fastidc.ops.fp8_linear import in_fp8, linear
from fastidc.ops.layer_norm import _torch_unless_chosen, as_product, fused
from fastidc.reference import quick_gelu as reference


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y sigmoid(1.702 y) with y = x + bias; x [..., C], bias [C] or None. Returns x's shape and dtype. The kernels compute in fp32 and keep x
    alone; of their gradients there is no gradient. ValueError, in sentences, for tensors that do not fit and where ``backend`` cannot serve."""
    _check(x, bias)
    return op(_spec(x, bias), _while_compiling(backend))(x, bias)


def quick_gelu_linear(
    x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor | None, *, backend: str = "auto", fp8_rows: int | None = None
) -> Tensor:
    """F.linear(quick_gelu(x, x_bias), weight, bias): x [..., C], weight [D, C], bias [D] or None -> [..., D].

    Where the kernels serve, the activations are not kept for the weight's gradient but made once more in the pass that makes x's.
    ``fp8_rows``: see `fastidc.ops.fp8_linear.in_fp8`.
    """
    _check(x, x_bias)
    served_by = op.serving(_spec(x, x_bias), _while_compiling(backend))
    if fused(x, served_by):
        return triton_backend.quick_gelu_linear(x, x_bias, *as_product(x, weight, bias), in_fp8(x, fp8_rows))
    return linear(op.backends[served_by].run(x, x_bias), weight, bias, fp8_rows)


def sums_bias(x: Tensor) -> bool:
    """Whether a bias costs nothing when given to `quick_gelu_linear` with x or its like, its gradient being made in a pass that is made anyway.
    The product that makes x would add the bias for nothing too, and then read a gradient of x's size to sum it."""
    return fused(x, op.serving(_spec(x, None), _while_compiling("auto")))


def _while_compiling(backend: str) -> str:
    """As `fastidc.ops.layer_norm` has it: in a graph "auto" is torch's, which the compiler fuses with what is around."""
    return _torch_unless_chosen("quick_gelu", backend) if torch.compiler.is_compiling() else backend


def _spec(x: Tensor, bias: Tensor | None) -> Spec:
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    return Spec("quick_gelu", x.device.type, x.dtype, torch.is_grad_enabled() and wanted, arch_of(x.device))


def _check(x: Tensor, bias: Tensor | None) -> None:
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [..., C] with C at least 1, got {x.dtype} {list(x.shape)}.")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be [{x.shape[-1]}], got {list(bias.shape)}.")


def _torch(x: Tensor, bias: Tensor | None) -> Tensor:
    # y sigmoid(a y) = silu(a y) / a: silu has one kernel each way and keeps one tensor for its backward
    return F.silu(1.702 * (x if bias is None else (x + bias).to(x.dtype))) / 1.702


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: on CUDA the kernels go first, one pass over memory each way where torch has three, and the bias's gradient in
    the same one. On a CPU torch's."""
    return ("triton", "torch") if spec.device == "cuda" else ("torch", "triton")


op = Op(
    "quick_gelu",
    [
        Backend("triton", triton_backend.quick_gelu, triton_backend.unsupported),
        Backend("torch", _torch),
        Backend("reference", reference.quick_gelu),
    ],
    order=_order,
)
