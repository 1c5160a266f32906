"""InfoNCE over a process group: every rank scores its own texts against the pairs of all ranks, once.

Rank r has rows r*B to (r+1)*B of the W*B x W*B scores. A row's log-sum-exp is complete on its rank; a column's is put together by all-reduce.
Gradients of texts are complete where they are; those of pairs are sums over ranks, which a reduce-scatter brings home. No rank computes
what another one does, and none holds more than B x W*B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


@dataclass(frozen=True)
class Gathering:
    """Pair embeddings on their way to all ranks; see `start_gather`."""

    own: Tensor  # [B, E], normalised, with its graph
    everyone: Tensor  # [W*B, E], rank after rank, once ``work`` is done
    work: "dist.Work"
    group: "dist.ProcessGroup"


def start_gather(pair: Tensor, group: "dist.ProcessGroup") -> Gathering:
    """Sends pair [B, E], not normalised, to every rank of ``group`` without waiting: the other tower can run meanwhile. Every rank must give
    the same number of rows. Its result takes the place of ``pair`` in `fastidc.ops.info_nce`."""
    own = F.normalize(wide(pair), dim=-1)
    everyone = own.new_empty(dist.get_world_size(group) * len(own), own.shape[-1])
    work = dist.all_gather_into_tensor(everyone, own.detach().contiguous(), group=group, async_op=True)
    return Gathering(own, everyone, work, group)


def wide(x: Tensor) -> Tensor:
    """x in the precision of the statistics: fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def shared_info_nce(text: Tensor, pair: Gathering, logit_scale: Tensor, gather_grad: str) -> Tensor:
    """text [B, E], not normalised -> the loss over all W*B rows, a scalar, the same on every rank."""
    pair.work.wait()
    return _Shared.apply(F.normalize(wide(text), dim=-1), pair.own, pair.everyone, logit_scale, pair.group, gather_grad)


class _Shared(torch.autograd.Function):
    """Gradients are made for an average over ranks to follow (DistributedDataParallel's): "full" multiplies the towers' by W, which makes
    every parameter's that of one process with the whole batch; "local" does not, which is the official outcome. The temperature's share of
    every rank is multiplied by W in both."""

    @staticmethod
    def forward(ctx, text, pair, everyone, logit_scale, group, gather_grad):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        ctx.group, ctx.size, ctx.first, ctx.factor = group, size, rank * len(text), size if gather_grad == "full" else 1
        scores = logit_scale.exp() * text @ everyone.T  # [B, W*B]
        rows = scores.logsumexp(dim=1)
        top = scores.amax(dim=0)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        total = (scores - top).exp().sum(dim=0)
        dist.all_reduce(total, group=group)
        columns = top + total.log()
        mine = slice(ctx.first, ctx.first + len(text))
        loss = (rows + columns[mine] - 2 * scores[:, mine].diagonal()).sum()
        dist.all_reduce(loss, group=group)
        ctx.save_for_backward(text, everyone, logit_scale, rows, columns)
        return loss / (2 * len(everyone))

    @staticmethod
    def backward(ctx, grad):
        text, everyone, logit_scale, rows, columns = ctx.saved_tensors
        scale = logit_scale.exp()
        scores = scale * text @ everyone.T
        weight = (scores - rows[:, None]).exp() + (scores - columns).exp()
        weight[:, ctx.first : ctx.first + len(text)].diagonal().sub_(2)
        weight *= grad / (2 * len(everyone))
        of_all = scale * weight.T @ text  # this rank's share of every pair's gradient
        of_own = torch.empty_like(text)
        dist.reduce_scatter_tensor(of_own, of_all, group=ctx.group)
        of_text = scale * weight @ everyone
        of_scale = (weight * scores).sum().to(logit_scale.dtype) * ctx.size
        return of_text * ctx.factor, of_own * ctx.factor, None, of_scale, None, None
