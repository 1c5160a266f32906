"""A linear layer's product in FP8: forward and the gradient of its input, on torch's scaled matrix product.

It is torchao's recipe "rowwise_with_gw_hp": numbers are scaled row by row as they come, the weight's gradient stays in bf16. torchao itself
replaces nn.Linear modules, and half of our products are in none: `layer_norm_linear` and `quick_gelu_linear` multiply inside an op that makes
the left operand once more in its backward pass. What both need is two products, so here are two products, `fp8_linear_fwd` and
`fp8_linear_bwd`, and nothing stands in `fastidc.ops._dispatch`: a backend there gives the same numbers as its peers, and this gives others.

Decisions: e4m3 for gradients too, because a row brings its own scale and needs no exponents of e5m2: over noise dx is off by 0.037 with it and by
0.059 with e5m2. Scales are powers of two, so that a weight rounds to the same numbers in both directions, and divisions are exact,
compiled or not. Quantising is a pass of its own over each operand; LayerNorm and QuickGELU could write eight bits at once, which
would save the reading of their rows, and do not yet.
"""

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
LEAST_SCALE = 2.0**-100  # for rows of zeros, and of next to nothing
LEAST_ROWS, LEAST_WIDTH = 1024, 460
"""Which products gain from FP8, by arithmetic and not by measurement: at 790 and 1,580 TFLOP/s it saves 1.3e-15 s a multiplication, and quantising
costs 5 bytes a number at 4.3 TB/s. The weight's share is saved from about 900 rows on; that of the rows, [M, K] forward and [M, N] backward, where
K N / (K + N) is 460 or more. Of ViT-B/32 that is qkv, fc1 and fc2 of the image tower, and nothing that is 512 wide."""


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) with x and weight rounded to e4m3: x [..., K] by token, weight [N, K] by output channel, bias [N] or None ->
    [..., N] in x's dtype. `fastidc.reference.fp8_linear` states the numbers and the gradients, of which there is no gradient again.

    All are bf16 or all fp32; K and N are multiples of 16. A row that is not finite comes out not finite. ValueError, in sentences, for tensors
    that do not fit. On CUDA it takes compute capability 8.9: see `unsupported`.
    """
    _check(x, weight, bias)
    return fp8_linear_fwd(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, fp8_rows: int | None = None) -> Tensor:
    """F.linear(x, weight, bias), in FP8 where `in_fp8` says so; there it casts as autocast does."""
    if not in_fp8(x, fp8_rows):
        return F.linear(x, weight, bias)
    half = torch.bfloat16
    return fp8_linear(x.to(half), weight.to(half), None if bias is None else bias.to(half))


def in_fp8(x: Tensor, fp8_rows: int | None) -> bool:
    """Whether the product of x's rows runs in FP8: where it is asked for (``fp8_rows`` is not None), would be one in bf16, and has so many rows."""
    return fp8_rows is not None and (autocast_dtype(x) or x.dtype) == torch.bfloat16 and x.numel() // x.shape[-1] >= fp8_rows


def fits(weight: Tensor) -> bool:
    """Whether a [N, K] weight can be multiplied in FP8 in both directions: Hopper reads 16 numbers at a time along each sum."""
    return weight.dim() == 2 and not any(size % 16 for size in weight.shape)


def gains(weight: Tensor) -> bool:
    """Whether products with a [N, K] weight are large enough to be faster in FP8: see `LEAST_WIDTH`."""
    outer, inner = weight.shape
    return outer * inner >= LEAST_WIDTH * (outer + inner)


def unsupported(device: torch.device) -> list[str]:
    """Why ``device`` cannot multiply in FP8, in sentences. A CPU can; it is slow at it, and good for tests alone."""
    if device.type == "cpu":
        return []
    if device.type != "cuda":
        return [f"FP8 products are for CUDA, not for {device.type}."]
    out = []
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        out.append(f"FP8 products need compute capability 8.9 or higher (Ada, Hopper), and this device has {major}.{minor}.")
    if importlib.util.find_spec("triton") is None:
        out.append("FP8 operands are quantised by a kernel of torch.compile, for which the package triton is not installed.")
    return out


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast multiplies x in; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) else None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        found = ", ".join(str(t.dtype) for t in (x, weight, bias) if t is not None)
        raise ValueError(f"x, weight and bias must all be bfloat16 or all float32, got {found}.")
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}.")
    if not fits(weight):
        raise ValueError(f"an FP8 product needs widths that are multiples of 16, got weight {list(weight.shape)}.")


# ---- quantising


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] -> e4m3 [R, C] and scales [R, 1] fp32, of which the product is x: powers of two, each the least that brings its row to 448."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=LEAST_SCALE)
    # to the next power of two, where it is none: a carry out of the mantissa's bits into the exponent, and no mantissa
    scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


@functools.cache
def _quantiser(device: str):
    """`quantised`, on CUDA as one kernel of the compiler's: operator by operator it moves 17 bytes a number instead of 5, more than a product
    saves. One graph for all shapes of a dtype, made when the first product runs."""
    return torch.compile(quantised, dynamic=True) if device == "cuda" else quantised


def _product(a: Tensor, b: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    """a [M, C] and b [N, C], quantised by row -> a b^T + bias, [M, N] in a's dtype. fast: see `fp8_linear_fwd`."""
    if not len(a):
        return a.new_empty(0, len(b))
    quantise = _quantiser(a.device.type)
    inside = bias if a.dtype == torch.bfloat16 else None  # torch adds a bias to products that come out in half precision
    # Without gradients and autocast, of which the compiler would make a graph each; and a CPU's product would obey autocast.
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        (a8, a_scale), (b8, b_scale) = (quantise(x.detach().contiguous()) for x in (a, b))
        out = torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale.t(), bias=inside, out_dtype=a.dtype, use_fast_accum=fast)
    return out if bias is inside else out + bias


# ---- registered ops


@torch.library.custom_op("fastidc::fp8_linear_fwd", mutates_args=())
def fp8_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `fp8_linear`. Sums in the tensor cores' own short accumulators, as the field does forward; gradients get full ones."""
    return _product(x.reshape(-1, x.shape[-1]), weight, bias, fast=True).view(*x.shape[:-1], len(weight))


@fp8_linear_fwd.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fastidc::fp8_linear_bwd", mutates_args=())
def fp8_linear_bwd(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, [..., K], from that of the result, [..., N]: the sum runs over the outputs, along which the hardware wants both operands
    laid out and one scale valid, so the weight is turned and quantised by input channel."""
    return _product(grad.reshape(-1, grad.shape[-1]), weight.t(), None, fast=False).view(*grad.shape[:-1], weight.shape[1])


@fp8_linear_bwd.register_fake
def _(grad, weight):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx, grad):
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    dweight = rows.T @ x.reshape(-1, x.shape[-1]) if of_weight else None
    return fp8_linear_bwd(grad, weight) if of_x else None, dweight, rows.sum(0) if of_bias else None


fp8_linear_fwd.register_autograd(_gradient, setup_context=_save)
