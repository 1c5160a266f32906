"""The kernels of `fastidc_kernels.info_nce` as registered ops, for one process; `_info_nce_group` calls the same launchers for many."""

import functools

import torch
from torch import Tensor

from fastidc.ops._dispatch import Spec
from fastidc.ops._info_nce_faults import faults_of
from fastidc.ops._triton import readable, refusals
from fastidc_kernels import _tiles
from fastidc_kernels._launch import statistic


def unsupported(spec: Spec) -> list[str]:
    """Why the kernels cannot serve, in sentences. ``spec.head_dim`` is the embeddings' width."""
    out = refusals(spec)
    if spec.head_dim > _tiles.WIDEST:
        out.append(f"an embedding may have {_tiles.WIDEST} numbers at most, not {spec.head_dim}.")
    return out


def info_nce(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """See `fastidc.ops.info_nce`."""
    return info_nce_fwd(text, pair, logit_scale)[0]


# ---- registered ops


@functools.cache
def kernels():
    """Imported when first needed: importing fastidc imports no Triton."""
    from fastidc_kernels import info_nce

    return info_nce


@torch.library.custom_op("fastidc::info_nce_fwd", mutates_args=())
def info_nce_fwd(text: Tensor, pair: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """text, pair [B, E], logit_scale [] -> loss [] and what the backward pass reads: unit [2B, W], norms [2, 2B], softmax [2, 2B], miss [B]."""
    rows = len(text)
    unit, norms = kernels().info_nce_unit(readable(text), readable(pair), faults_of(text.device))
    parts = kernels().info_nce_fwd(unit, norms, logit_scale, rows)
    loss, softmax, miss = kernels().info_nce_loss(*parts, 0, rows)
    return loss, unit, norms, softmax, miss


@info_nce_fwd.register_fake
def _(text, pair, logit_scale):
    rows, dtype = text.shape[0], statistic(text.dtype)
    unit = text.new_empty(2 * rows, sum(_tiles.halves(text.shape[1])))
    loss, norms, softmax, miss = (text.new_empty(shape, dtype=dtype) for shape in ((), (2, 2 * rows), (2, 2 * rows), (rows,)))
    return loss, unit, norms, softmax, miss


@torch.library.custom_op("fastidc::info_nce_bwd", mutates_args=())
def info_nce_bwd(
    grad: Tensor, unit: Tensor, norms: Tensor, softmax: Tensor, miss: Tensor, logit_scale: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The gradient [2B, E] of texts, then pairs, in unit's dtype, and logit_scale's []."""
    return kernels().info_nce_bwd(unit, norms, softmax, miss, logit_scale, grad, 0, len(miss), width, unit.dtype)


@info_nce_bwd.register_fake
def _(grad, unit, norms, softmax, miss, logit_scale, width):
    return unit.new_empty(unit.shape[0], width), torch.empty_like(logit_scale)


def _save(ctx, inputs, output):
    text, _, logit_scale = inputs
    ctx.width = text.shape[1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], logit_scale)


def _gradient(ctx, grad, *unused):
    if grad is None:
        return None, None, None
    *saved, logit_scale = ctx.saved_tensors
    gradient, scale_gradient = info_nce_bwd(grad, *saved, logit_scale, ctx.width)
    rows = len(gradient) // 2
    return gradient[:rows], gradient[rows:], scale_gradient


info_nce_fwd.register_autograd(_gradient, setup_context=_save)
