"""Vocabulary projection and cross entropy in one call, without the logits in memory."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops import _linear_cross_entropy_triton as triton_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of
from fastidc.reference import linear_cross_entropy as reference
from fastidc_kernels._launch import statistic

CHUNK = 2**26  # bytes of a chunk's logits in the torch backend, which holds two such tensors at a time


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, ignore_index: int = 0, backend: str = "auto"
) -> Tensor:
    """Mean over targets other than ``ignore_index`` of -log softmax(x W^T + b)[target].

    x [N, D], weight [V, D], bias [V], targets [N] of any integer dtype. Returns a scalar in fp32 (fp64 for fp64 inputs); where every target is
    ignored it is 0, and so are its gradients. Under autocast x and weight are taken in autocast's dtype, as `F.linear` takes them; the bias is
    added in fp32 and stays as it is. The log-sum-exp is in fp32 too. A target that is neither ``ignore_index`` nor in [0, V) is a ValueError on a
    CPU; on a GPU the kernels leave its row out and `fastidc.ops.raise_faults` says so. Only the reference has a gradient of the gradient.
    """
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, weight = (given.to(torch.get_autocast_dtype(device)) for given in (x, weight))
    _check(x, weight, bias, targets)
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    spec = Spec("linear_cross_entropy", device, x.dtype, grad, arch_of(x.device), head_dim=x.shape[1])
    return op(spec, backend)(x, weight, bias, targets, ignore_index)


def _check(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    shapes = f"{list(x.shape)}, {list(weight.shape)}, {list(bias.shape)} and {list(targets.shape)}"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1] or targets.shape != x.shape[:1]:
        raise ValueError(f"x, weight, bias and targets must be [N, D], [V, D], [V] and [N], got {shapes}.")
    if not x.numel() or not weight.numel():
        raise ValueError(f"N, V and D must be at least 1, got x, weight, bias and targets of {shapes}.")
    if (
        not x.is_floating_point()
        or weight.dtype != x.dtype
        or bias.dtype not in (x.dtype, *((torch.float32,) if x.dtype.itemsize < 4 else ()))
    ):
        raise ValueError(
            f"x and weight must have one floating-point dtype, and bias that or fp32 where they are in half precision, got {x.dtype}, "
            f"{weight.dtype} and {bias.dtype}."
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}.")
    if not x.device == weight.device == bias.device == targets.device:
        raise ValueError(
            f"x, weight, bias and targets must be on one device, got {x.device}, {weight.device}, {bias.device} and {targets.device}."
        )


# ---- the torch backend: chunks of rows, and with each chunk's loss its gradients


def _torch(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    wanted = [torch.is_grad_enabled() and given.requires_grad for given in (x, weight, bias)]
    return linear_cross_entropy_chunked(x, weight, bias, targets, ignore_index, *wanted)[0]


@torch.library.custom_op("fastidc::linear_cross_entropy_chunked", mutates_args=())
def linear_cross_entropy_chunked(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the number of targets that count (1 where none does), and the gradients of the sum of losses that are asked for, the others
    empty."""
    with torch.autocast(x.device.type, enabled=False) if x.device.type in ("cpu", "cuda") else nullcontext():
        return _in_chunks(x, weight, bias, targets.long(), ignore_index, of_x, of_weight, of_bias)


def _in_chunks(x, weight, bias, targets, ignore_index, of_x, of_weight, of_bias):
    wide, keep, rows = statistic(x.dtype), targets != ignore_index, len(x)
    count, kept = keep.sum().clamp(min=1), None
    if x.device.type == "cpu":  # rows without a target cost nothing; on CUDA the selection would wait for the device
        if not bool(keep.all()):
            kept = keep.nonzero().squeeze(1)
            x, targets, keep = x[kept], targets[kept], keep[kept]
        _check_targets(targets, len(weight), ignore_index)
    step = max(1, CHUNK // (len(weight) * wide.itemsize))
    step = -(-len(x) // max(1, -(-len(x) // step)))  # chunks of one size: a short last one would waste a pass over the words
    loss, bias = x.new_zeros((), dtype=wide), bias.to(wide)
    of_rows, words_grad, bias_grad = [], None, bias.new_zeros(len(bias) if of_bias else 0)
    for start in range(0, len(x), max(1, step)):
        part = slice(start, start + step)
        own, there = targets[part], keep[part, None]
        own = torch.where(there[:, 0], own, 0)[:, None]
        logits = torch.addmm(bias, x[part], weight.T) if x.dtype == wide else (x[part] @ weight.T).to(wide).add_(bias)
        surplus = F.log_softmax(logits, 1)
        del logits
        loss -= surplus.gather(1, own).mul_(there).sum()
        if not (of_x or of_weight or of_bias):
            continue
        surplus.exp_().scatter_add_(1, own, surplus.new_full(own.shape, -1.0))
        if kept is None and x.device.type != "cpu":
            surplus.mul_(there)
        if of_bias:
            bias_grad += surplus.sum(0)
        surplus = surplus.to(x.dtype)
        if of_x:
            of_rows.append(surplus @ weight)
        if of_weight and words_grad is None:
            words_grad = (surplus.T @ x[part]).to(wide)
        elif of_weight and x.dtype == wide:
            words_grad.addmm_(surplus.T, x[part])  # in place: a table more would be read and written a chunk
        elif of_weight:
            words_grad += surplus.T @ x[part]
    row_grad = x.new_zeros(0)
    if of_x:
        row_grad = torch.cat(of_rows) if of_rows else x.new_zeros(x.shape)
        if kept is not None:
            row_grad = x.new_zeros(rows, x.shape[1]).index_copy_(0, kept, row_grad)
    if words_grad is None:
        words_grad = x.new_zeros(weight.shape if of_weight else 0, dtype=wide)
    return loss / count, count, row_grad, words_grad, bias_grad


def _check_targets(targets: Tensor, words: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= words)).nonzero()
    if len(wrong):
        raise ValueError(
            f"a target is {int(targets[wrong[0]])}, which is neither ignore_index {ignore_index} nor one of the {words} words."
        )


@linear_cross_entropy_chunked.register_fake
def _(x, weight, bias, targets, ignore_index, of_x, of_weight, of_bias):
    wide = statistic(x.dtype)
    words_grad = x.new_empty(weight.shape if of_weight else (0,), dtype=wide)
    bias_grad = x.new_empty(bias.shape if of_bias else (0,), dtype=wide)
    count = targets.new_empty((), dtype=torch.int64)
    return x.new_empty((), dtype=wide), count, x.new_empty(x.shape if of_x else (0,)), words_grad, bias_grad


def _save(ctx, inputs, output):
    ctx.bias_dtype = inputs[2].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradient(ctx, grad, *unused):
    if grad is None:
        return (None,) * 8
    wanted = ctx.needs_input_grad[:3]
    found = linear_cross_entropy_chunked_bwd(grad, *ctx.saved_tensors, *wanted, ctx.bias_dtype)
    return *(gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)), None, None, None, None, None


@torch.library.custom_op("fastidc::linear_cross_entropy_chunked_bwd", mutates_args=())
def linear_cross_entropy_chunked_bwd(
    grad: Tensor,
    count: Tensor,
    of_rows: Tensor,
    of_words: Tensor,
    of_bias: Tensor,
    x: bool,
    weight: bool,
    bias: bool,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum -> those of ``grad`` times the mean. An op of its own, and without a derivative: what it is given was made in the
    forward pass, and torch would take it for constants in a gradient of the gradient."""
    factor, dtypes = grad / count, (of_rows.dtype, of_rows.dtype, bias_dtype)
    wanted = zip((x, weight, bias), (of_rows, of_words, of_bias), dtypes, strict=True)
    return tuple((g.to(factor.dtype) * factor).to(dtype) if wants else g.new_empty(0, dtype=dtype) for wants, g, dtype in wanted)


@linear_cross_entropy_chunked_bwd.register_fake
def _(grad, count, of_rows, of_words, of_bias, x, weight, bias, bias_dtype):
    wanted = zip((x, weight, bias), (of_rows, of_words, of_bias), (of_rows.dtype, of_rows.dtype, bias_dtype), strict=True)
    return tuple(torch.empty_like(g, dtype=dtype) if wants else g.new_empty(0, dtype=dtype) for wants, g, dtype in wanted)


linear_cross_entropy_chunked.register_autograd(_gradient, setup_context=_save)


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: in half precision the kernels go first, whose logits never leave the chip and which skip pads without asking
    the device how many there are. In fp32 they have no tensor cores, and torch's products go first."""
    half = spec.device == "cuda" and spec.dtype in (torch.float16, torch.bfloat16)
    return ("triton", "torch") if half else ("torch", "triton")


op = Op(
    "linear_cross_entropy",
    [
        Backend("triton", triton_backend.linear_cross_entropy, triton_backend.unsupported),
        Backend("torch", _torch),
        Backend("reference", reference.linear_cross_entropy),
    ],
    order=_order,
)
