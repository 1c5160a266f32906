"""Device code of `fastidc_kernels.info_nce`, whose docstring says what is computed and what every name means."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_EPS = tl.constexpr(1e-12)  # of F.normalize
_LAST = tl.constexpr(2**31 - 1)  # a fault is _LAST - row, so that the largest names the first row and 0 none


@triton.jit
def _unit(
    x_ptr,
    row,
    rows,
    row_stride,
    out,
    unit_ptr,
    norm_ptr,
    fault_ptr,
    total,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows ``row`` of one input to places ``out`` of the scratch, zeros past ``width``."""
    real = row < rows
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=real[:, None] & (column < DIM)[None, :], other=0.0)
    wide = x.to(ACC)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    clamped = tl.maximum(norm, tl.full([], _EPS, ACC), propagate_nan=tl.PropagateNan.ALL)
    inverse = 1.0 / clamped
    place = out.to(tl.int64)[:, None] * WIDTH + column[None, :]
    there = real[:, None] & (column < WIDTH)[None, :]
    if unit_ptr.dtype.element_ty.primitive_bitwidth == 16:
        power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        tl.store(unit_ptr + place, (wide * power[:, None]).to(unit_ptr.dtype.element_ty), mask=there)
        tl.store(norm_ptr + out, inverse / power, mask=real)
    else:
        tl.store(unit_ptr + place, wide / clamped[:, None], mask=there)
        tl.store(norm_ptr + out, tl.full([out.shape[0]], 1.0, ACC), mask=real)
    tl.store(norm_ptr + total + out, inverse, mask=real)
    finite = norm < float("inf")
    fault = tl.max(tl.where(real & (finite == 0), _LAST - row, 0), 0)
    tl.atomic_max(fault_ptr, fault, mask=fault > 0)


@triton.jit(do_not_specialize=["rows", "columns"])
def info_nce_unit_kernel(
    rows_ptr,
    columns_ptr,
    unit_ptr,
    norm_ptr,
    faults,
    rows,
    columns,
    row_stride,
    column_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    FP64: tl.constexpr,
):
    """rows [N, D], columns [M, D] -> unit [N + M, WIDTH], factors and inverse norms [2, N + M]. One program: COUNT vectors of either."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    program, first = tl.program_id(0), tl.cdiv(rows, COUNT)
    total = rows + columns
    if program < first:
        i = program * COUNT + tl.arange(0, COUNT)
        _unit(rows_ptr, i, rows, row_stride, i, unit_ptr, norm_ptr, faults, total, DIM, WIDTH, BLOCK, ACC)
    else:
        i = (program - first) * COUNT + tl.arange(0, COUNT)
        _unit(columns_ptr, i, columns, column_stride, rows + i, unit_ptr, norm_ptr, faults + 1, total, DIM, WIDTH, BLOCK, ACC)


@triton.jit(do_not_specialize=["rows", "columns", "offset", "steps"])
def info_nce_fwd_kernel(
    unit_ptr,
    norm_ptr,
    scale_ptr,
    row_ptr,
    column_ptr,
    diagonal_ptr,
    rows,
    columns,
    offset,
    steps,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: BLOCK_R rows against ``steps`` blocks of columns; neighbouring programs share their columns.

    One loop over blocks and over pieces of the vectors, so that loads for the next block run while this one's exponentials do."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    PIECES: tl.constexpr = WIDTH // BLOCK_D
    blocks = tl.cdiv(rows, BLOCK_R)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    row_real = row < rows
    scale = tl.exp(tl.load(scale_ptr).to(ACC)) * tl.full([], _LOG2_E, ACC)
    row_factor = tl.load(norm_ptr + row, mask=row_real, other=0.0)
    piece = tl.arange(0, BLOCK_D)
    row_at = unit_ptr + row.to(tl.int64)[:, None] * WIDTH + piece[None, :]
    column_unit = unit_ptr + rows.to(tl.int64) * WIDTH
    top = tl.full([BLOCK_R], float("-inf"), ACC)
    sums = tl.zeros([BLOCK_R], ACC)
    scores = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    first = part * steps
    taken = tl.minimum(steps, tl.cdiv(columns, BLOCK_C) - first)
    for step in range(taken * PIECES):
        d = step % PIECES
        start = (first + step // PIECES) * BLOCK_C
        column = start + tl.arange(0, BLOCK_C)
        column_real = column < columns
        x = tl.load(row_at + d * BLOCK_D, mask=row_real[:, None], other=0.0)
        y_at = column_unit + column.to(tl.int64)[:, None] * WIDTH + piece[None, :]
        y = tl.load(y_at + d * BLOCK_D, mask=column_real[:, None], other=0.0)
        scores = tl.dot(x, tl.trans(y), scores, input_precision="ieee", out_dtype=ACC)
        if d == PIECES - 1:
            column_factor = tl.load(norm_ptr + rows + column, mask=column_real, other=0.0)
            s = scores * (row_factor[:, None] * column_factor[None, :]) * scale  # in this order, for the backward pass to get the same bits
            if (start < (block + 1) * BLOCK_R + offset) & (start + BLOCK_C > block * BLOCK_R + offset):
                own = (row + offset)[:, None] == column[None, :]
                inside = row_real & (row + offset >= start) & (row + offset < start + BLOCK_C)
                tl.store(diagonal_ptr + row, tl.sum(tl.where(own, s, 0.0), 1), mask=inside)
            s = tl.where(row_real[:, None] & column_real[None, :], s, float("-inf"))
            higher = tl.where(row_real, tl.maximum(top, tl.max(s, 1)), 0.0)
            sums = sums * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            top = higher
            column_top = tl.where(column_real, tl.max(s, 0), 0.0)
            column_sums = tl.sum(tl.exp2(s - column_top[None, :]), 0)
            column_at = column_ptr + block.to(tl.int64) * 2 * columns + column
            tl.store(column_at, column_top, mask=column_real)
            tl.store(column_at + columns, column_sums, mask=column_real)
            scores = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    part_at = row_ptr + part.to(tl.int64) * 2 * rows + row
    tl.store(part_at, top, mask=row_real)
    tl.store(part_at + rows, sums, mask=row_real)


@triton.jit
def _combined(base, index, real, parts, count, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Maximum and sum at ``index`` over all parts, PARTS at a time in a fixed order."""
    top = tl.full([BLOCK], float("-inf"), ACC)
    sums = tl.zeros([BLOCK], ACC)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = base + part.to(tl.int64)[:, None] * 2 * count + index[None, :]
        there = (part < parts)[:, None] & real[None, :]
        tops = tl.load(at, mask=there, other=float("-inf"))
        higher = tl.maximum(top, tl.max(tops, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a place that is not real
        sums = sums * tl.exp2(top - safe) + tl.sum(tl.load(at + count, mask=there, other=0.0) * tl.exp2(tops - safe[None, :]), 0)
        top = higher
    return top, tl.where(real, sums, 1.0)


@triton.jit(do_not_specialize=["rows", "columns", "offset", "row_parts", "column_parts", "share"])
def info_nce_fwd_loss_kernel(
    row_ptr,
    column_ptr,
    diagonal_ptr,
    row_out,
    column_out,
    softmax_ptr,
    miss_ptr,
    loss_ptr,
    rows,
    columns,
    offset,
    row_parts,
    column_parts,
    share,
    LOSS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FP64: tl.constexpr,
):
    """Parts -> one part each or, with LOSS, maxima and 1 / sums, what the diagonal lacks, and a sum of losses. One program: BLOCK columns and their rows."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column_real = column < columns
    row = column - offset
    row_real = (row >= 0) & (row < rows) & column_real
    top, sums = _combined(row_ptr, row, row_real, row_parts, rows, PARTS, BLOCK, ACC)
    column_top, column_sums = _combined(column_ptr, column, column_real, column_parts, columns, PARTS, BLOCK, ACC)
    if LOSS:
        diagonal = tl.load(diagonal_ptr + row, mask=row_real, other=0.0)
        tl.store(softmax_ptr + row, top, mask=row_real)
        tl.store(softmax_ptr + rows + column, column_top, mask=column_real)
        tl.store(softmax_ptr + rows + columns + row, 1.0 / sums, mask=row_real)
        tl.store(softmax_ptr + 2 * rows + columns + column, 1.0 / column_sums, mask=column_real)
        # from differences with the maxima, in which nothing is lost where a diagonal is its row's maximum
        own, column_own = diagonal - top, diagonal - column_top
        miss = (1.0 - tl.exp2(own) / sums) + (1.0 - tl.exp2(column_own) / column_sums)
        tl.store(miss_ptr + row, miss, mask=row_real)
        loss = (tl.log2(sums) - own) + (tl.log2(column_sums) - column_own)
        total = tl.sum(tl.where(row_real, loss, 0.0), 0) * tl.full([], _LN_2, ACC)
        tl.store(loss_ptr + tl.program_id(0), total / (2.0 * share))
    else:
        tl.store(row_out + row, top, mask=row_real)
        tl.store(row_out + rows + row, sums, mask=row_real)
        tl.store(column_out + column, column_top, mask=column_real)
        tl.store(column_out + columns + column, column_sums, mask=column_real)


@triton.jit(do_not_specialize=["count", "share"])
def info_nce_sum_kernel(terms_ptr, factor_ptr, out_ptr, count, share, BLOCK: tl.constexpr, FP64: tl.constexpr):
    """out = sum of terms, times factor / (2 share) where there is a factor; one program, one order."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    sums = tl.zeros([BLOCK], ACC)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        sums += tl.load(terms_ptr + place, mask=place < count, other=0.0)
    total = tl.sum(sums, 0)
    if factor_ptr is not None:
        total = total * tl.load(factor_ptr).to(ACC) * tl.full([], _LN_2, ACC) / (2.0 * share)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty))
