"""Device code of `fastidc_kernels.linear_cross_entropy`, whose docstring says what is computed and what every name means."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LIFT = tl.constexpr(12.0)  # powers of two by which probabilities are raised: 1 / V is no normal number in fp16
_LEAST = tl.constexpr(-3.0e38)  # below any logit, and finite: words whose bias is -inf may fill a tile
_LAST = tl.constexpr(2**31 - 1)  # a fault is _LAST - row, so that the largest names the first row and 0 none


@triton.jit
def _wanted(targets_ptr, row, limit, vocabulary, ignore_index):
    """Targets of rows below ``limit``, and which of them are words; the rest is pads or, second, no word at all."""
    there = row < limit
    target = tl.load(targets_ptr + row, mask=there, other=0).to(tl.int64)
    pad = target == ignore_index
    word = (target >= 0) & (target < vocabulary)
    return target, there & (pad == 0) & word, there & (pad == 0) & (word == 0)


@triton.jit(do_not_specialize=["rows", "vocabulary", "ignore_index"])
def linear_cross_entropy_pack_kernel(
    x_ptr,
    targets_ptr,
    packed_ptr,
    order_ptr,
    words_ptr,
    count_ptr,
    fault_ptr,
    rows,
    vocabulary,
    ignore_index,
    x_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program: COUNT rows to their places. It counts the rows before its own by itself, so that one launch is enough."""
    first = tl.program_id(0) * COUNT
    before = tl.zeros([SCAN], tl.int32)
    for start in range(0, first, SCAN):
        _, real, _ = _wanted(targets_ptr, start + tl.arange(0, SCAN), first, vocabulary, ignore_index)
        before += real.to(tl.int32)
    earlier = tl.sum(before, 0)
    row = first + tl.arange(0, COUNT)
    there = row < rows
    target, real, wrong = _wanted(targets_ptr, row, rows, vocabulary, ignore_index)
    upto = earlier + tl.cumsum(real.to(tl.int32), 0)
    place = tl.where(real, upto - 1, rows - 1 - (row - upto))  # rows that are left out stand at the end, last first
    tl.store(order_ptr + place, row, mask=there)
    tl.store(words_ptr + place, tl.where(real, target, -1).to(tl.int32), mask=there)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=real[:, None] & (column < DIM)[None, :], other=0.0)
    tl.store(packed_ptr + place.to(tl.int64)[:, None] * WIDTH + column[None, :], x, mask=there[:, None] & (column < WIDTH)[None, :])
    if first + COUNT >= rows:
        tl.store(count_ptr, earlier + tl.sum(real.to(tl.int32), 0))
    fault = tl.max(tl.where(wrong, _LAST - row, 0), 0)
    tl.atomic_max(fault_ptr, fault, mask=fault > 0)


@triton.jit
def piece(base, row, number, DIM: tl.constexpr, PIECES: tl.constexpr, SLICE: tl.constexpr):
    """Piece ``number`` modulo PIECES, of SLICE columns each, of rows ``row`` of a table [.., DIM], zeros past DIM."""
    column = (number % PIECES) * SLICE + tl.arange(0, SLICE)
    at = base + row[:, None] * DIM + column[None, :]
    if PIECES * SLICE == DIM:
        return tl.load(at)
    else:
        return tl.load(at, mask=(column < DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["rows", "vocabulary", "steps"])
def linear_cross_entropy_fwd_kernel(
    packed_ptr,
    weight_ptr,
    bias_ptr,
    count_ptr,
    statistic_ptr,
    mixture_ptr,
    rows,
    vocabulary,
    steps,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: BLOCK_R packed rows against ``steps`` tiles of words; neighbouring programs share their words. Attention, where words are keys
    and values: without ``mixture_ptr`` the values are left out, with it a program mixes SLICE columns of them.

    A row of scores that both warp groups need is computed by both, so a program has 64 rows for each of them and mixes a slice of their
    columns, as many as registers hold, rather than all columns of fewer rows. Its own slice is piece 0 of a row here."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    WIDTH: tl.constexpr = PIECES * SLICE
    SLICES: tl.constexpr = 1 if mixture_ptr is None else PIECES
    blocks = tl.cdiv(rows, BLOCK_R)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    slice, part = rest % SLICES, rest // SLICES
    count = tl.load(count_ptr)
    if block * BLOCK_R >= count:
        return
    local = tl.arange(0, BLOCK_R)
    inside = tl.minimum(local, count - 1 - block * BLOCK_R)  # a row past the end is the last one again, and is not stored
    own = packed_ptr + (block * BLOCK_R).to(tl.int64) * WIDTH
    x = piece(own, inside, slice, WIDTH, PIECES, SLICE)
    if PIECES > 1:
        x_1 = piece(own, inside, slice + 1, WIDTH, PIECES, SLICE)
    if PIECES > 2:
        x_2 = piece(own, inside, slice + 2, WIDTH, PIECES, SLICE)
    if PIECES > 3:
        x_3 = piece(own, inside, slice + 3, WIDTH, PIECES, SLICE)
    log2_e = tl.full([], LOG2_E, ACC)
    top = tl.full([BLOCK_R], _LEAST, ACC)
    sums = tl.zeros([BLOCK_R], ACC)
    if mixture_ptr is not None:
        mixture = tl.zeros([BLOCK_R, SLICE], ACC)
    begin = part * steps * BLOCK_V
    for start in range(begin, tl.minimum(begin + steps * BLOCK_V, vocabulary), BLOCK_V):
        word = tl.arange(0, BLOCK_V)
        taken = tl.minimum(word, vocabulary - 1 - start)
        table = weight_ptr + start * tl.full([], DIM, tl.int64)
        w = piece(table, taken, slice, DIM, PIECES, SLICE)
        s = tl.dot(x, tl.trans(w), input_precision="ieee", out_dtype=ACC)
        if PIECES > 1:
            s = tl.dot(x_1, tl.trans(piece(table, taken, slice + 1, DIM, PIECES, SLICE)), s, input_precision="ieee", out_dtype=ACC)
        if PIECES > 2:
            s = tl.dot(x_2, tl.trans(piece(table, taken, slice + 2, DIM, PIECES, SLICE)), s, input_precision="ieee", out_dtype=ACC)
        if PIECES > 3:
            s = tl.dot(x_3, tl.trans(piece(table, taken, slice + 3, DIM, PIECES, SLICE)), s, input_precision="ieee", out_dtype=ACC)
        bias = tl.load(bias_ptr + start + word, mask=start + word < vocabulary, other=float("-inf")).to(ACC)
        s = s * log2_e + (bias * log2_e)[None, :]
        higher = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp2(top - higher)
        p = tl.exp2(s - (higher - LIFT)[:, None])
        sums = sums * fade + tl.sum(p, 1)
        top = higher
        if mixture_ptr is not None:
            mixture = tl.dot(p.to(w.dtype), w, mixture * fade[:, None], input_precision="ieee", out_dtype=ACC)
    place = block * BLOCK_R + local
    real = place < count
    out = statistic_ptr + rest.to(tl.int64) * 2 * rows + place  # of every slice: their scores were summed in other orders
    tl.store(out, top - LIFT, mask=real)
    tl.store(out + rows, sums, mask=real)
    if mixture_ptr is not None:
        column = slice * SLICE + tl.arange(0, SLICE)
        out = mixture_ptr + (part.to(tl.int64) * rows + block * BLOCK_R) * DIM + local[:, None] * DIM + column[None, :]
        tl.store(out, mixture, mask=real[:, None] & (column < DIM)[None, :])


@triton.jit(do_not_specialize=["rows", "parts"])
def linear_cross_entropy_fwd_loss_kernel(
    statistic_ptr,
    mixture_ptr,
    packed_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
    words_ptr,
    count_ptr,
    terms_ptr,
    lse_ptr,
    out_ptr,
    rows,
    parts,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SLICE: tl.constexpr,
    COUNT: tl.constexpr,
    FP64: tl.constexpr,
):
    """Parts of COUNT packed rows -> their losses, log-sum-exps and, with ``out_ptr``, the gradient where each row came from."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    SLICES: tl.constexpr = 1 if out_ptr is None else PIECES
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there, real = place < rows, place < tl.load(count_ptr)
    word = tl.load(words_ptr + place, mask=real, other=0)
    row = tl.load(order_ptr + place, mask=there, other=0)
    own = tl.load(bias_ptr + word, mask=real, other=0.0).to(ACC)
    stride = rows.to(tl.int64) * (SLICES * 2)
    top, sums = _combined(statistic_ptr + place, real, parts, stride, rows, COUNT, ACC)
    for slice in tl.static_range(PIECES):
        column = slice * SLICE + tl.arange(0, SLICE)
        inside = real[:, None] & (column < DIM)[None, :]
        w = tl.load(weight_ptr + word.to(tl.int64)[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(ACC)
        x = tl.load(packed_ptr + place.to(tl.int64)[:, None] * (PIECES * SLICE) + column[None, :], mask=inside, other=0.0).to(ACC)
        own += tl.sum(x * w, 1)
        if out_ptr is not None:
            statistic = statistic_ptr + slice * 2 * rows + place
            slice_top, slice_sums = _combined(statistic, real, parts, stride, rows, COUNT, ACC)
            mixture = tl.zeros([COUNT, SLICE], ACC)
            for part in range(parts):
                fade = tl.exp2(tl.load(statistic + part * stride, mask=real, other=0.0) - slice_top)
                at = mixture_ptr + (part * rows.to(tl.int64) + place)[:, None] * DIM + column[None, :]
                mixture += fade[:, None] * tl.load(at, mask=inside, other=0.0)
            gradient = tl.where(real[:, None], mixture / slice_sums[:, None] - w, 0.0).to(out_ptr.dtype.element_ty)
            out = out_ptr + row.to(tl.int64)[:, None] * DIM + column[None, :]
            tl.store(out, gradient, mask=there[:, None] & (column < DIM)[None, :])
    # from the difference with the maximum, in which nothing is lost where the target is the maximum
    loss = (tl.log2(sums) - (own * tl.full([], LOG2_E, ACC) - top)) * tl.full([], LN_2, ACC)
    tl.store(terms_ptr + place, tl.where(real, loss, 0.0), mask=there)
    tl.store(lse_ptr + place, tl.where(real, top + tl.log2(sums), float("inf")), mask=there)


@triton.jit
def _combined(statistic, real, parts, stride, rows, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Maximum and sum over all parts, in a fixed order."""
    top = tl.full([COUNT], _LEAST, ACC)
    for part in range(parts):
        top = tl.maximum(top, tl.load(statistic + part * stride, mask=real, other=0.0))
    sums = tl.zeros([COUNT], ACC)
    for part in range(parts):
        at = statistic + part * stride
        sums += tl.exp2(tl.load(at, mask=real, other=0.0) - top) * tl.load(at + rows, mask=real, other=1.0)
    return top, sums


@triton.jit(do_not_specialize=["rows"])
def linear_cross_entropy_fwd_sum_kernel(terms_ptr, count_ptr, out_ptr, rows, BLOCK: tl.constexpr, FP64: tl.constexpr):
    """The sum of terms over the number of rows that have a target; one program, one order."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    sums = tl.zeros([BLOCK], ACC)
    for first in range(0, rows, BLOCK):
        place = first + tl.arange(0, BLOCK)
        sums += tl.load(terms_ptr + place, mask=place < rows, other=0.0)
    tl.store(out_ptr, tl.sum(sums, 0) / tl.maximum(tl.load(count_ptr), 1).to(ACC))
