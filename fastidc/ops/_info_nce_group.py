"""InfoNCE over a process group: every rank scores its own texts against the pairs of all ranks, once.

Rank r has rows r*B to (r+1)*B of the W*B x W*B scores. A row's log-sum-exp is complete on its rank; a column's is put together by all-reduce.
Gradients of texts are complete where they are; those of pairs are sums over ranks, which a reduce-scatter brings home. No rank computes
what another one does. With the kernels no scores are in memory at all; with torch's products a rank holds its B x W*B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from fastidc.ops import _info_nce_triton
from fastidc.ops._info_nce_faults import faults_of, note_faults
from fastidc.ops._triton import readable


@dataclass(frozen=True)
class Gathering:
    """Pair embeddings on their way to all ranks; see `start_gather`."""

    own: Tensor  # [B, E] as given, with its graph
    everyone: Tensor  # [W*B, E], rank after rank, once ``work`` is done
    work: "dist.Work"
    group: "dist.ProcessGroup"


def start_gather(pair: Tensor, group: "dist.ProcessGroup") -> Gathering:
    """Sends pair [B, E], not normalised, to every rank of ``group`` without waiting: the other tower can run meanwhile. Its result takes the
    place of ``pair`` in `fastidc.ops.info_nce`; until then ``pair`` must not be written to.

    Every rank must give the same B and E. Shapes that are new to all of them are compared first, which waits once; a rank that departs
    alone from a shape that was in use is for the collective to find. ValueError where they differ, where there is no group, and where this
    process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "a group needs torch.distributed, which is not initialised; call init_process_group first (torchrun), or give none."
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group that it gave; call it on the group's own ranks only.")
    if pair.dim() != 2 or not pair.numel():
        raise ValueError(f"pair must be [B, E], B and E at least 1, got {list(pair.shape)}.")
    _agree(pair, group)
    everyone = pair.new_empty(dist.get_world_size(group) * len(pair), pair.shape[1])
    work = dist.all_gather_into_tensor(everyone, pair.detach().contiguous(), group=group, async_op=True)
    return Gathering(pair, everyone, work, group)


_agreed: "WeakKeyDictionary[dist.ProcessGroup, set[tuple[int, int]]]" = WeakKeyDictionary()


def _agree(pair: Tensor, group: "dist.ProcessGroup") -> None:
    known = _agreed.setdefault(group, set())
    if tuple(pair.shape) in known:
        return
    own = torch.tensor(pair.shape, device=pair.device)
    shapes = own.new_empty(dist.get_world_size(group) * 2)
    dist.all_gather_into_tensor(shapes, own, group=group)
    shapes = shapes.view(-1, 2).tolist()
    if any(shape != shapes[0] for shape in shapes):
        given = ", ".join(f"{shape} by rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(f"every rank of a group must give as many pairs of the same width, got {given}.")
    known.add(tuple(pair.shape))


def wide(x: Tensor) -> Tensor:
    """x in the precision of the statistics: fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


class Block(Protocol):
    """A rank's N rows against all M columns, in the three parts between which the ranks talk."""

    @staticmethod
    def prepare(x: Tensor) -> Tensor:
        """Of [B, E] embeddings, inside their graph, what the gradients below belong to."""

    @staticmethod
    def scores(rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int, faults: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """rows from `prepare`, columns as they came -> each column's maximum over these rows, in units of log 2, and sum of 2^(s - maximum),
        [2, M]; and what `loss` wants. faults: see `fastidc.ops._info_nce_faults`."""

    @staticmethod
    def loss(rest: Sequence[Tensor], columns: Tensor, offset: int) -> tuple[Tensor, Sequence[Tensor]]:
        """columns [2, M] of all ranks -> these rows' share of the loss, and what `gradients` wants."""

    @staticmethod
    def gradients(saved: Sequence[Tensor], grad: Tensor, logit_scale: Tensor, offset: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> of rows [N, E], this block's part of all columns' [M, E], its part of logit_scale's []; in the precision of the statistics."""


class Kernels:
    """`fastidc_kernels.info_nce`."""

    @staticmethod
    def prepare(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def scores(rows, columns, logit_scale, offset, faults):
        kernels = _info_nce_triton.kernels()
        unit, norms = kernels.info_nce_unit(readable(rows), readable(columns), faults)
        row, column, diagonal = kernels.info_nce_fwd(unit, norms, logit_scale, len(rows), offset)
        row, column = kernels.info_nce_combine(row, column)
        return column[0], (unit, norms, row, diagonal)

    @staticmethod
    def loss(rest, columns, offset):
        unit, norms, row, diagonal = rest
        part, softmax, miss = _info_nce_triton.kernels().info_nce_loss(row, columns[None], diagonal, offset, columns.shape[1])
        return part, (unit, norms, softmax, miss)

    @staticmethod
    def gradients(saved, grad, logit_scale, offset, width):
        unit, norms, softmax, miss = saved
        of_all, of_scale = _info_nce_triton.kernels().info_nce_bwd(
            unit, norms, softmax, miss, logit_scale, grad, offset, len(unit) - len(miss), width, softmax.dtype
        )
        return of_all[: len(miss)], of_all[len(miss) :], of_scale


class Products:
    """torch's matrix products: any device and width, B x W*B scores in memory."""

    @staticmethod
    def prepare(x: Tensor) -> Tensor:
        return F.normalize(wide(x), dim=-1)

    @staticmethod
    def scores(rows, columns, logit_scale, offset, faults):
        note_faults(rows, columns, faults)
        everyone = F.normalize(wide(columns), dim=-1)
        scores = logit_scale.exp() * rows @ everyone.T  # [N, M]
        top = scores.amax(dim=0)
        total = (scores - top).exp().sum(dim=0)
        return torch.stack([top / _LN_2, total]), (scores, rows, everyone, scores.logsumexp(dim=1))

    @staticmethod
    def loss(rest, columns, offset):
        scores, rows, everyone, of_rows = rest
        of_columns = columns[0] * _LN_2 + columns[1].log()
        mine = slice(offset, offset + len(rows))
        part = (of_rows + of_columns[mine] - 2 * scores[:, mine].diagonal()).sum() / (2 * len(everyone))
        return part, (rows, everyone, of_rows, of_columns)

    @staticmethod
    def gradients(saved, grad, logit_scale, offset, width):
        rows, everyone, of_rows, of_columns = saved
        scale = logit_scale.exp()
        scores = scale * rows @ everyone.T
        weight = (scores - of_rows[:, None]).exp() + (scores - of_columns).exp()
        weight[:, offset : offset + len(rows)].diagonal().sub_(2)
        weight *= grad / (2 * len(everyone))
        return scale * weight @ everyone, scale * weight.T @ rows, (weight * scores).sum()


_LN_2 = 0.6931471805599453
BLOCKS: dict[str, type[Block]] = {"triton": Kernels, "torch": Products}


def shared_info_nce(text: Tensor, pair: Gathering, logit_scale: Tensor, gather_grad: str, block: type[Block]) -> Tensor:
    """text [B, E], not normalised -> the loss over all W*B rows, a scalar, the same on every rank."""
    pair.work.wait()
    return _Shared.apply(block.prepare(text), block.prepare(pair.own), pair.everyone, logit_scale, pair.group, gather_grad, block)


class _Shared(torch.autograd.Function):
    """Gradients are made for an average over ranks to follow (DistributedDataParallel's): "full" multiplies the towers' by W, which makes
    every parameter's that of one process with the whole batch; "local" does not, which is the official outcome. The temperature's share of
    every rank is multiplied by W in both."""

    @staticmethod
    def forward(ctx, text, pair, everyone, logit_scale, group, gather_grad, block):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        ctx.group, ctx.block, ctx.size, ctx.first = group, block, size, rank * len(text)
        ctx.width, ctx.dtypes, ctx.factor = text.shape[1], (text.dtype, pair.dtype), size if gather_grad == "full" else 1
        column, rest = block.scores(text, everyone, logit_scale, ctx.first, faults_of(text.device, len(text)))
        top, total = column
        highest = top.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        total *= (top - highest).exp2()
        dist.all_reduce(total, group=group)
        loss, saved = block.loss(rest, torch.stack([highest, total]), ctx.first)
        dist.all_reduce(loss, group=group)
        ctx.save_for_backward(logit_scale, *saved)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # what other ranks hold would be missing from it, without a word
            raise RuntimeError("info_nce over a group has no gradient of a gradient; call backward without create_graph.")
        logit_scale, *saved = ctx.saved_tensors
        of_text, of_all, of_scale = ctx.block.gradients(saved, grad, logit_scale, ctx.first, ctx.width)
        of_own = torch.empty_like(of_text)
        dist.reduce_scatter_tensor(of_own, of_all, group=ctx.group)
        text, pair = ((ctx.factor * x).to(dtype) for x, dtype in zip((of_text, of_own), ctx.dtypes, strict=True))
        return text, pair, None, (ctx.size * of_scale).to(logit_scale.dtype), None, None, None
