"""The kernels of `fastidc_kernels.linear_cross_entropy` as registered ops."""

import functools

import torch
from torch import Tensor

from fastidc.ops._dispatch import Spec
from fastidc.ops._flags import Flag
from fastidc.ops._triton import readable, refusals
from fastidc_kernels import _tiles
from fastidc_kernels._launch import statistic


def unsupported(spec: Spec) -> list[str]:
    """Why the kernels cannot serve, in sentences. ``spec.head_dim`` is the rows' width."""
    out = refusals(spec)
    if spec.head_dim > _tiles.WIDEST:
        out.append(f"a row may have {_tiles.WIDEST} numbers at most, not {spec.head_dim}.")
    elif spec.device == "cuda" and spec.dtype == torch.float32 and spec.head_dim > 256:
        out.append(
            f"in fp32 a row may have 256 numbers at most, not {spec.head_dim}: without tensor cores a tile of more does not fit registers."
        )
    return out


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """See `fastidc.ops.linear_cross_entropy`."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    return linear_cross_entropy_fwd(x, weight, bias, targets, ignore_index, wanted)[0]


# ---- targets that are no words

_flag = Flag()


def take_faults() -> list[str]:
    """What was no word since the last call, in sentences."""
    return [
        f"The captioning loss met a target that is neither the pad id nor a word of the vocabulary, first in row {2**31 - 1 - raised} of "
        "its batch; such rows were left out."
        for raised in _flag.take()
    ]


# ---- registered ops


@functools.cache
def _kernels():
    """Imported when first needed: importing fastidc imports no Triton."""
    from fastidc_kernels import linear_cross_entropy as kernels

    return kernels


@torch.library.custom_op("fastidc::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [] and what the backward pass reads: the gradient [N, D] of the sum where it is ``wanted``, else empty, packed [N, W], lse [N],
    words [N] and count [1]."""
    kernels, weight, bias = _kernels(), weight.contiguous(), bias.contiguous()
    faults = _flag.on(x.device)
    packed, order, words, count = kernels.linear_cross_entropy_pack(readable(x), targets.contiguous(), len(weight), ignore_index, faults)
    parts = kernels.linear_cross_entropy_fwd(packed, weight, bias, count, wanted)
    loss, lse, gradient = kernels.linear_cross_entropy_loss(*parts, packed, weight, bias, order, words, count)
    return loss, x.new_empty(0) if gradient is None else gradient, packed, lse, words, count


@linear_cross_entropy_fwd.register_fake
def _(x, weight, bias, targets, ignore_index, wanted):
    pieces, piece = _tiles.linear_cross_entropy_pieces(x.shape[1])
    wide = statistic(x.dtype)
    loss, lse = x.new_empty((), dtype=wide), x.new_empty(x.shape[:1], dtype=wide)
    words, count = x.new_empty(x.shape[:1], dtype=torch.int32), x.new_empty(1, dtype=torch.int32)
    return loss, x.new_empty(x.shape if wanted else (0,)), x.new_empty(x.shape[0], pieces * piece), lse, words, count


@torch.library.custom_op("fastidc::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd(
    grad: Tensor,
    gradient: Tensor,
    packed: Tensor,
    lse: Tensor,
    words: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias that are asked for, in their dtypes, the others empty. With a frozen table no word is multiplied."""
    kernels, weight, bias = _kernels(), weight.contiguous(), bias.contiguous()
    row_grad = kernels.linear_cross_entropy_scale(gradient, grad, count) if of_x else gradient.new_empty(0)
    others = kernels.linear_cross_entropy_bwd(grad, packed, weight, bias, lse, words, count, of_weight, of_bias)
    return row_grad, *(like.new_empty(0) if found is None else found for found, like in zip(others, (weight, bias), strict=True))


@linear_cross_entropy_bwd.register_fake
def _(grad, gradient, packed, lse, words, count, weight, bias, of_x, of_weight, of_bias):
    wanted = ((gradient, of_x), (weight, of_weight), (bias, of_bias))
    return tuple(like.new_empty(like.shape if wants else (0,)) for like, wants in wanted)


def _save(ctx, inputs, output):
    _, weight, bias, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], weight, bias)


def _gradient(ctx, grad, *unused):
    if grad is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad[:3]
    found = linear_cross_entropy_bwd(grad, *ctx.saved_tensors, *wanted)
    return *(gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)), None, None, None


linear_cross_entropy_fwd.register_autograd(_gradient, setup_context=_save)
