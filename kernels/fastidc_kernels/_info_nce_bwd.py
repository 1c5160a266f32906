"""Device code of the backward pass of `fastidc_kernels.info_nce`, whose docstring says what every name means."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_EPS = tl.constexpr(1e-12)  # of F.normalize
_LIFT = tl.constexpr(4096.0)  # probabilities of 1 / B stay normal numbers in fp16


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
