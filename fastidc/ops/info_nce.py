"""Symmetric cosine InfoNCE, of one process or over the batches of a process group."""

from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import info_nce as reference

GatherGrad = Literal["full", "local"]


def info_nce(
    text: Tensor,
    pair: Tensor,
    logit_scale: Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    gather_grad: GatherGrad = "full",
    backend: str = "auto",
) -> Tensor:
    """Mean of the text-to-pair and pair-to-text cross entropies (paper eq. 6 to 8; clip4idc.md 4).

    text, pair [B, E], row i belonging to row i, not normalised; logit_scale [], a logarithm as CLIP stores it. Returns a scalar in
    fp32 (fp64 for fp64 inputs). Statistics are taken in that precision whatever the inputs are.

    With ``group`` every rank gives its own B rows, the same number on each, and gets the loss over the rows of all of them. Where
    gradients are then averaged over the ranks, as DistributedDataParallel does, ``gather_grad="full"`` makes every parameter's gradient
    that of one process with the whole batch; ``"local"`` is the official code's: the towers' gradients are divided by the number of
    ranks, logit_scale's is not.
    """
    if gather_grad not in ("full", "local"):
        raise ValueError(f'gather_grad must be "full" or "local", got {gather_grad!r}.')
    run = op(Spec("info_nce", text.device.type, text.dtype, text.requires_grad), backend)
    if group is not None:
        size = dist.get_world_size(group)
        text, pair = (_Gather.apply(x, group, size if gather_grad == "full" else 1) for x in (text, pair))
    return run(text, pair, logit_scale)


class _Gather(torch.autograd.Function):
    """[B, E] on every rank -> [W * B, E], rank after rank, on all of them.

    Every rank computes the same loss of the whole, so the gradient of its own rows is the whole truth about them and nothing has to be
    communicated; ``factor`` = W makes up for the average over ranks that follows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group, factor: int) -> Tensor:
        ctx.rank, ctx.rows, ctx.factor = dist.get_rank(group), len(x), factor
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        own = grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]
        return own * ctx.factor, None, None


def _torch(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    if text.dtype.itemsize < 4:
        text, pair = text.float(), pair.float()
    return reference.info_nce(text, pair, logit_scale)


op = Op("info_nce", [Backend("torch", _torch), Backend("reference", reference.info_nce)], order=lambda spec: ("torch",))
