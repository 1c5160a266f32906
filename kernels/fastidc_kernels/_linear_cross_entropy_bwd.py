"""Device code of the backward pass of `fastidc_kernels.linear_cross_entropy`, whose docstring says what every name means."""

import triton
import triton.language as tl

from fastidc_kernels._linear_cross_entropy import LIFT, LOG2_E, piece


@triton.jit
def _factor(grad_ptr, count, ACC: tl.constexpr):
    """Upstream gradient over the number of rows that have a target."""
    return tl.load(grad_ptr).to(ACC) / tl.maximum(count, 1).to(ACC)


@triton.jit
def _surplus(s, bias, word, place, count, lse_ptr, words_ptr, ACC: tl.constexpr):
    """Products [words, rows] -> 2^LIFT (softmax - one-hot), 0 for places past ``count``."""
    real = place < count
    lse = tl.load(lse_ptr + place, mask=real, other=float("inf"))
    own = tl.load(words_ptr + place, mask=real, other=-1)
    p = tl.exp2(s * tl.full([], LOG2_E, ACC) + bias[:, None] - (lse - LIFT)[None, :])
    return p - tl.where(word[:, None] == own[None, :], tl.exp2(tl.full([], LIFT, ACC)), 0.0)


@triton.jit(do_not_specialize=["vocabulary"])
def linear_cross_entropy_bwd_kernel(
    packed_ptr,
    weight_ptr,
    bias_ptr,
    lse_ptr,
    words_ptr,
    count_ptr,
    grad_ptr,
    weight_out,
    bias_out,
    vocabulary,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: SLICE columns of the gradient of BLOCK_V words, against all packed rows, and with the first slice that of their bias (where
    there is ``bias_out``). Slices are for what they are for in the forward pass."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    WIDTH: tl.constexpr = PIECES * SLICE
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    first, slice = tl.program_id(0) % tiles * BLOCK_V, tl.program_id(0) // tiles
    local = tl.arange(0, BLOCK_V)
    word = first + local
    taken = tl.minimum(local, vocabulary - 1 - first)
    table = weight_ptr + first.to(tl.int64) * DIM
    w = piece(table, taken, slice, DIM, PIECES, SLICE)
    if PIECES > 1:
        w_1 = piece(table, taken, slice + 1, DIM, PIECES, SLICE)
    if PIECES > 2:
        w_2 = piece(table, taken, slice + 2, DIM, PIECES, SLICE)
    if PIECES > 3:
        w_3 = piece(table, taken, slice + 3, DIM, PIECES, SLICE)
    bias = tl.load(bias_ptr + word, mask=word < vocabulary, other=float("-inf")).to(ACC) * tl.full([], LOG2_E, ACC)
    count = tl.load(count_ptr)
    sums = tl.zeros([BLOCK_V], ACC)
    gradient = tl.zeros([BLOCK_V, SLICE], ACC)
    for start in range(0, count, BLOCK_R):
        row = tl.arange(0, BLOCK_R)
        inside = tl.minimum(row, count - 1 - start)  # a row past the end is the last one again, times 0
        rows = packed_ptr + start * tl.full([], WIDTH, tl.int64)
        x = piece(rows, inside, slice, WIDTH, PIECES, SLICE)
        s = tl.dot(w, tl.trans(x), input_precision="ieee", out_dtype=ACC)
        if PIECES > 1:
            s = tl.dot(w_1, tl.trans(piece(rows, inside, slice + 1, WIDTH, PIECES, SLICE)), s, input_precision="ieee", out_dtype=ACC)
        if PIECES > 2:
            s = tl.dot(w_2, tl.trans(piece(rows, inside, slice + 2, WIDTH, PIECES, SLICE)), s, input_precision="ieee", out_dtype=ACC)
        if PIECES > 3:
            s = tl.dot(w_3, tl.trans(piece(rows, inside, slice + 3, WIDTH, PIECES, SLICE)), s, input_precision="ieee", out_dtype=ACC)
        p = _surplus(s, bias, word, start + row, count, lse_ptr, words_ptr, ACC)
        sums += tl.sum(p, 1)
        gradient = tl.dot(p.to(x.dtype), x, gradient, input_precision="ieee", out_dtype=ACC)
    factor = _factor(grad_ptr, count, ACC) * tl.exp2(tl.full([], -LIFT, ACC))
    real, column = word < vocabulary, slice * SLICE + tl.arange(0, SLICE)
    out = weight_out + first.to(tl.int64) * DIM + local[:, None] * DIM + column[None, :]
    tl.store(out, (gradient * factor).to(weight_out.dtype.element_ty), mask=real[:, None] & (column < DIM)[None, :])
    if bias_out is not None:
        tl.store(bias_out + word, (sums * factor).to(bias_out.dtype.element_ty), mask=word < tl.where(slice == 0, vocabulary, 0))


@triton.jit(do_not_specialize=["vocabulary"])
def linear_cross_entropy_bwd_bias_kernel(
    packed_ptr,
    weight_ptr,
    bias_ptr,
    lse_ptr,
    words_ptr,
    count_ptr,
    grad_ptr,
    bias_out,
    vocabulary,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: BLOCK_V words against all packed rows, the gradient of their bias alone.

    One loop over blocks and over pieces of the rows, so that loads for the next block run while this one's exponentials do."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    first = tl.program_id(0) * BLOCK_V
    local = tl.arange(0, BLOCK_V)
    word = first + local
    taken = tl.minimum(local, vocabulary - 1 - first)
    table = weight_ptr + first.to(tl.int64) * DIM
    row = tl.arange(0, BLOCK_R)
    bias = tl.load(bias_ptr + word, mask=word < vocabulary, other=float("-inf")).to(ACC) * tl.full([], LOG2_E, ACC)
    count = tl.load(count_ptr)
    sums = tl.zeros([BLOCK_V], ACC)
    s = tl.zeros([BLOCK_V, BLOCK_R], ACC)
    for step in range(tl.cdiv(count, BLOCK_R) * PIECES):
        start = (step // PIECES) * BLOCK_R
        inside = tl.minimum(row, count - 1 - start)
        w = piece(table, taken, step, DIM, PIECES, SLICE)
        x = piece(packed_ptr + start * tl.full([], PIECES * SLICE, tl.int64), inside, step, PIECES * SLICE, PIECES, SLICE)
        s = tl.dot(w, tl.trans(x), s, input_precision="ieee", out_dtype=ACC)
        if step % PIECES == PIECES - 1:
            sums += tl.sum(_surplus(s, bias, word, start + row, count, lse_ptr, words_ptr, ACC), 1)
            s = tl.zeros([BLOCK_V, BLOCK_R], ACC)
    factor = _factor(grad_ptr, count, ACC) * tl.exp2(tl.full([], -LIFT, ACC))
    tl.store(bias_out + word, (sums * factor).to(bias_out.dtype.element_ty), mask=word < vocabulary)


@triton.jit(do_not_specialize=["rows"])
def linear_cross_entropy_bwd_scale_kernel(
    gradient_ptr, grad_ptr, count_ptr, out_ptr, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, FP64: tl.constexpr
):
    """gradient [N, D] times the upstream gradient over the number of rows that have a target."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < rows.to(tl.int64) * DIM
    value = tl.load(gradient_ptr + place, mask=real, other=0.0).to(ACC) * _factor(grad_ptr, tl.load(count_ptr), ACC)
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=real)
