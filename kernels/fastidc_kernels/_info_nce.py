"""Device code of `fastidc_kernels.info_nce`, whose docstring says what is computed and what every name means."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_EPS = tl.constexpr(1e-12)  # of F.normalize
_LIFT = tl.constexpr(4096.0)  # probabilities of 1 / B stay normal numbers in fp16
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


@triton.jit
def _again(rows, column, real, ACC: tl.constexpr):
    x = tl.load(rows + column[None, :], mask=real[:, None], other=0.0, volatile=True)
    return tl.trans(x).to(ACC)


@triton.jit(do_not_specialize=["rows", "columns", "offset", "share"])
def info_nce_bwd_kernel(
    unit_ptr,
    norm_ptr,
    softmax_ptr,
    miss_ptr,
    scale_ptr,
    grad_ptr,
    out_ptr,
    terms_ptr,
    rows,
    columns,
    offset,
    share,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: BLOCK_R rows against all columns or, past the last block of rows, BLOCK_R columns against all rows.

    It computes its scores again and adds both directions' probabilities before the one product that both gradients share. A vector is a
    HEAD and a TAIL, powers of two, TAIL 0 where one is enough."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    WIDTH: tl.constexpr = HEAD + TAIL
    program, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK_R)
    of_rows = program < blocks
    block = tl.where(of_rows, program, program - blocks)
    own_first, own_count = tl.where(of_rows, 0, rows), tl.where(of_rows, rows, columns)
    other_first, other_count = tl.where(of_rows, rows, 0), tl.where(of_rows, columns, rows)
    shift = tl.where(of_rows, offset, -offset)
    own = block * BLOCK_R + tl.arange(0, BLOCK_R)
    own_real = own < own_count
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else HEAD)
    scale = tl.exp(tl.load(scale_ptr).to(ACC))
    own_unit = unit_ptr + (own_first + own).to(tl.int64)[:, None] * WIDTH
    x = tl.load(own_unit + head[None, :], mask=own_real[:, None], other=0.0)
    if TAIL:
        x_tail = tl.load(own_unit + tail[None, :], mask=own_real[:, None], other=0.0)
    factor = tl.load(norm_ptr + own_first + own, mask=own_real, other=0.0)
    top = tl.load(softmax_ptr + own_first + own, mask=own_real, other=0.0)
    own_share = tl.load(softmax_ptr + rows + columns + own_first + own, mask=own_real, other=0.0)
    pointed = tl.where(of_rows, own, own + shift)  # a column's row
    miss = tl.load(miss_ptr + pointed, mask=own_real & (pointed >= 0) & (pointed < rows), other=0.0)
    base_2 = scale * tl.full([], _LOG2_E, ACC)
    gradient = tl.zeros([HEAD, BLOCK_R], ACC)  # on its side: tensor cores then have 64 rows for every warp, however few vectors there are
    if TAIL:
        gradient_tail = tl.zeros([TAIL, BLOCK_R], ACC)
    moved = tl.zeros([BLOCK_R], ACC)
    for start in range(0, other_count, BLOCK_C):
        other = start + tl.arange(0, BLOCK_C)
        other_real = other < other_count
        other_unit = unit_ptr + (other_first + other).to(tl.int64)[:, None] * WIDTH
        y = tl.load(other_unit + head[None, :], mask=other_real[:, None], other=0.0)
        s = tl.dot(y, tl.trans(x), input_precision="ieee", out_dtype=ACC)  # [others, own]
        if TAIL:
            y_tail = tl.load(other_unit + tail[None, :], mask=other_real[:, None], other=0.0)
            s = tl.dot(y_tail, tl.trans(x_tail), s, input_precision="ieee", out_dtype=ACC)
        other_factor = tl.load(norm_ptr + other_first + other, mask=other_real, other=0.0)
        other_top = tl.load(softmax_ptr + other_first + other, mask=other_real, other=0.0)
        other_share = tl.load(softmax_ptr + rows + columns + other_first + other, mask=other_real, other=0.0)
        s = s * (factor[None, :] * other_factor[:, None]) * base_2
        p = tl.exp2(s - top[None, :]) * own_share[None, :] + tl.exp2(s - other_top[:, None]) * other_share[:, None]
        p = tl.where((own + shift)[None, :] == other[:, None], -miss[None, :], p)
        p = tl.where(other_real[:, None], p, 0.0)
        moved += tl.sum(p * s, 0)
        p = (p * (other_factor * tl.full([], _LIFT, ACC))[:, None]).to(y.dtype)
        gradient = tl.dot(tl.trans(y), p, gradient, input_precision="ieee", out_dtype=ACC)
        if TAIL:
            gradient_tail = tl.dot(tl.trans(y_tail), p, gradient_tail, input_precision="ieee", out_dtype=ACC)
    # Through the normalisation: the part along the vector itself goes, unless the norm was clamped. The loop leaves no registers for this:
    # the vector is read again wherever it is needed ("volatile" keeps the compiler from making one load of all), and places are computed
    # again (it does not know that program_id(1) and (2) are 0).
    own = block * BLOCK_R + tl.arange(0, BLOCK_R) + tl.program_id(1)
    own_real = own < own_count
    own_unit = unit_ptr + (own_first + own).to(tl.int64)[:, None] * WIDTH
    tl.store(terms_ptr + own, moved, mask=own < tl.where(of_rows, rows, 0))
    along = tl.sum(gradient * _again(own_unit, head, own_real, ACC), 0)
    if TAIL:
        along += tl.sum(gradient_tail * _again(own_unit, tail, own_real, ACC), 0)
    own = block * BLOCK_R + tl.arange(0, BLOCK_R) + tl.program_id(2)
    own_real = own < own_count
    own_unit = unit_ptr + (own_first + own).to(tl.int64)[:, None] * WIDTH
    inverse = tl.load(norm_ptr + rows + columns + own_first + own, mask=own_real, other=0.0)
    factor = tl.load(norm_ptr + own_first + own, mask=own_real, other=0.0, volatile=True)
    outer = inverse * (
        tl.exp(tl.load(scale_ptr, volatile=True).to(ACC)) * tl.load(grad_ptr).to(ACC) / (2.0 * share * tl.full([], _LIFT, ACC))
    )
    along = tl.where(inverse < 1.0 / tl.full([], _EPS, ACC), along * factor * factor, 0.0)
    out = out_ptr + (own_first + own).to(tl.int64)[:, None] * DIM
    result = (gradient - _again(own_unit, head, own_real, ACC) * along[None, :]) * outer[None, :]
    result = tl.trans(result.to(out_ptr.dtype.element_ty))
    tl.store(out + head[None, :], result, mask=own_real[:, None] & (head < DIM)[None, :])
    if TAIL:
        result = (gradient_tail - _again(own_unit, tail, own_real, ACC) * along[None, :]) * outer[None, :]
        result = tl.trans(result.to(out_ptr.dtype.element_ty))
        tl.store(out + tail[None, :], result, mask=own_real[:, None] & (tail < DIM)[None, :])
