"""Symmetric cosine InfoNCE without its scores in memory: both directions' statistics from one pass over S, and the gradients.

S = exp(logit_scale) cos(row_i, column_j) is a block of N rows and M columns. Row i belongs to column i + ``offset``: in one process the rows
are the texts, the columns the pairs, N = M and offset = 0; in a group a rank holds its own rows against the columns of all ranks.

    unit, norms = info_nce_unit(rows, columns, faults)                     # once, for the forward and the backward pass
    row, column, diagonal = info_nce_fwd(unit, norms, logit_scale, N, offset)
    row, column = info_nce_combine(row, column)                            # a group: [1, 2, N] and [1, 2, M]
    column = ...                                                           # a group: of all ranks, as below
    loss, softmax, miss = info_nce_loss(row, column, diagonal, offset, total)  # a group: the sum over ranks is the loss
    gradient, scale_gradient = info_nce_bwd(unit, norms, softmax, miss, logit_scale, grad, offset, total, width, dtype)

``row`` [P, 2, N] and ``column`` [Q, 2, M] hold P and Q parts of a statistic: a maximum in units of log 2 and the sum of 2^(s - maximum).
Parts of several ranks are combined as [ranks, 2, M], by the next call; or in place: the largest maximum, and the sum of sums times
2^(maximum - largest). A row has all its columns in its block and needs no other rank. ``total``: rows of all ranks. ``softmax`` [2, N + M] are
the maxima, then 1 / sums, of rows and columns; ``miss`` [N] is what both directions lack of certainty about their diagonal. ``gradient``
[N + M, width] has the whole gradient of the rows and this block's part of the columns' (ask for it in fp32 and sum over ranks);
``scale_gradient`` too is a part. Both are of the loss of all ranks.

In half precision a vector is kept as 2^k x with 2^k <= 1 / max(|x|, 1e-12) < 2^(k + 1), which rounds nothing, and a factor in [1, 2):
products on tensor cores are then those of the inputs as they came, and fp16 neither overflows nor underflows. In fp32 it is normalised and
its factor is 1. Nothing is added up by two programs, so the same call gives the same bits.
"""

import torch
from torch import Tensor

from fastidc_kernels import _info_nce as kernels
from fastidc_kernels import _info_nce_bwd as backward
from fastidc_kernels import _launch, _tiles


def info_nce_unit(rows: Tensor, columns: Tensor, faults: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, D], columns [M, D], each row's numbers side by side -> unit [N + M, W] of their dtype, W >= D zeros at the end, and norms
    [2, N + M]: factors and inverse norms. faults: int32 [2], of rows and of columns; where vectors are not finite it becomes at least
    2^31 - 1 - i, i the first of them."""
    count, width = len(rows) + len(columns), rows.shape[1]
    padded = sum(_tiles.halves(width))
    unit, norms = rows.new_empty(count, padded), rows.new_empty(2, count, dtype=_launch.statistic(rows.dtype))
    size = _tiles.power_of_two(padded)
    each = max(1, 4096 // size)
    grid = (-(-len(rows) // each) + -(-len(columns) // each),)
    facts = (len(rows), len(columns), rows.stride(0), columns.stride(0))
    static = {"DIM": width, "WIDTH": padded, "BLOCK": size, "COUNT": each, "FP64": rows.dtype == torch.float64}
    with _launch.on(rows.device):
        kernels.info_nce_unit_kernel[grid](rows, columns, unit, norms, faults, *facts, **static, num_warps=4)
    return unit, norms


def info_nce_fwd(
    unit: Tensor, norms: Tensor, logit_scale: Tensor, rows: int, offset: int = 0, tile: _tiles.InfoNCETile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of S, the first ``rows`` of unit against the rest -> parts of rows [P, 2, N] and of columns [Q, 2, M], and the diagonal
    [N], all in units of log 2. tile: the table's where none is given."""
    columns, width = len(unit) - rows, unit.shape[1]
    tile = tile or _tiles.info_nce_fwd(min(rows, columns), *_facts(unit))
    blocks, steps = -(-rows // tile.rows), _tiles.info_nce_steps(rows, columns, tile)
    parts = -(-columns // (tile.columns * steps))
    row, column = norms.new_empty(parts, 2, rows), norms.new_empty(blocks, 2, columns)
    diagonal = norms.new_empty(rows)
    static = {"WIDTH": width, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "BLOCK_D": min(tile.piece, width & -width)}
    facts = (rows, columns, offset, steps)
    with _launch.on(unit.device):
        kernels.info_nce_fwd_kernel[(blocks * parts,)](
            unit, norms, logit_scale, row, column, diagonal, *facts, **static, FP64=unit.dtype == torch.float64, **_launch.options(tile)
        )
    return row, column, diagonal


def info_nce_combine(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of both -> one part of each, [1, 2, N] and [1, 2, M]."""
    whole = row.new_empty(1, 2, row.shape[2]), row.new_empty(1, 2, column.shape[2])
    _loss(row, column, None, *whole, None, None, None, 0, 1)
    return whole


def info_nce_loss(row: Tensor, column: Tensor, diagonal: Tensor, offset: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of both and the diagonal -> these rows' share of the loss [], softmax [2, N + M], miss [N]. One launch where M is at most 512."""
    rows, columns = row.shape[2], column.shape[2]
    softmax, miss = row.new_empty(2, rows + columns), row.new_empty(rows)
    terms = row.new_empty(-(-columns // _BLOCK))
    _loss(row, column, diagonal, None, None, softmax, miss, terms, offset, total)
    return (terms[0].view(()) if len(terms) == 1 else _sum(terms, None, row.new_empty(()), 1)), softmax, miss


def info_nce_bwd(
    unit: Tensor,
    norms: Tensor,
    softmax: Tensor,
    miss: Tensor,
    logit_scale: Tensor,
    grad: Tensor,
    offset: int,
    total: int,
    width: int,
    dtype: torch.dtype,
    tile: _tiles.InfoNCETile | None = None,
) -> tuple[Tensor, Tensor]:
    """grad [], the gradient of the loss of ``total`` rows -> gradient [N + M, width] in ``dtype`` of the vectors as they came, rows first, and
    the gradient of logit_scale [] in its dtype. N is miss's length."""
    rows, columns = len(miss), len(unit) - len(miss)
    tile = tile or _tiles.info_nce_bwd(max(rows, columns), *_facts(unit))
    head, tail = _tiles.halves(width)
    gradient, scale_gradient = unit.new_empty(len(unit), width, dtype=dtype), torch.empty_like(logit_scale)
    terms = norms.new_empty(rows)
    grid = (-(-rows // tile.rows) + -(-columns // tile.rows),)
    tensors = (unit, norms, softmax, miss, logit_scale, grad, gradient, terms)
    static = {"DIM": width, "HEAD": head, "TAIL": tail, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "FP64": unit.dtype == torch.float64}
    with _launch.on(unit.device):
        backward.info_nce_bwd_kernel[grid](*tensors, rows, columns, offset, total, **static, **_launch.options(tile))
    return gradient, _sum(terms, grad, scale_gradient, total)


_BLOCK = 512  # columns of one program where parts are combined


def _loss(row, column, diagonal, row_out, column_out, softmax, miss, terms, offset, total) -> None:
    rows, columns = row.shape[2], column.shape[2]
    facts = (rows, columns, offset, len(row), len(column), total)
    static = {"LOSS": diagonal is not None, "PARTS": 16, "BLOCK": _BLOCK, "FP64": row.dtype == torch.float64}
    tensors = (row, column, diagonal, row_out, column_out, softmax, miss, terms)
    with _launch.on(row.device):
        kernels.info_nce_fwd_loss_kernel[(-(-columns // _BLOCK),)](*tensors, *facts, **static, num_warps=8)


def _sum(terms: Tensor, factor: Tensor | None, out: Tensor, total: int) -> Tensor:
    with _launch.on(terms.device):
        kernels.info_nce_sum_kernel[(1,)](terms, factor, out, len(terms), total, BLOCK=2048, FP64=terms.dtype == torch.float64, num_warps=8)
    return out


def _facts(unit: Tensor) -> tuple[int, int, int]:
    """Width, bytes of a number and architecture for the tables; the interpreter, whatever its dtype, walks half precision's blocks."""
    return unit.shape[1], unit.element_size() if unit.is_cuda else 2, _launch.arch(unit.device)
