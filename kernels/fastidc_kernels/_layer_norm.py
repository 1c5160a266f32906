"""Device code of `fastidc_kernels.layer_norm`, whose docstring says what is computed; and the sum of parts that `quick_gelu` shares."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    x_stride,
    residual_stride,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: BLOCK_R whole rows, read once and kept in registers, so that the variance is that of differences from the mean."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    row_real, column_real = row < rows, column < WIDTH
    real = row_real[:, None] & column_real[None, :]
    out = row[:, None] * WIDTH + column[None, :]
    s = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=real, other=0.0).to(ACC)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=real, other=0.0).to(ACC)
        kept = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + out, kept, mask=real)
        s = kept.to(ACC)  # what the backward pass reads is what is normalised
    mean = tl.sum(s, 1) / WIDTH
    centred = tl.where(real, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + tl.full([], EPS, ACC))
    weight = tl.load(weight_ptr + column, mask=column_real, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + column, mask=column_real, other=0.0).to(ACC)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=real)
    tl.store(mean_ptr + row, mean, mask=row_real)
    tl.store(rstd_ptr + row, rstd, mask=row_real)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_bwd_kernel(
    grad_ptr,
    s_grad_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    y_ptr,
    part_ptr,
    rows,
    grad_stride,
    s_grad_stride,
    s_stride,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: every n-th block of BLOCK_R rows, n programs in all; its share of the weight's and bias's gradients stays in registers."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    column = tl.arange(0, BLOCK_C)
    column_real = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=column_real, other=0.0).to(ACC)
    weight_grad = tl.zeros([BLOCK_C], ACC)
    bias_grad = tl.zeros([BLOCK_C], ACC)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        row_real = row < rows
        real = row_real[:, None] & column_real[None, :]
        out = row[:, None] * WIDTH + column[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=real, other=0.0).to(ACC)
        s = tl.load(s_ptr + row[:, None] * s_stride + column[None, :], mask=real, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + row, mask=row_real, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_real, other=0.0)
        unit = tl.where(real, s - mean[:, None], 0.0) * rstd[:, None]
        if y_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column_real, other=0.0).to(ACC)
            tl.store(y_ptr + out, (unit * weight[None, :] + bias[None, :]).to(y_ptr.dtype.element_ty), mask=real)
        if part_ptr is not None:
            weight_grad += tl.sum(grad * unit, 0)
            bias_grad += tl.sum(grad, 0)
        weighted = grad * weight[None, :]
        along = tl.sum(weighted * unit, 1) / WIDTH
        common = tl.sum(weighted, 1) / WIDTH
        dx = (weighted - common[:, None] - unit * along[:, None]) * rstd[:, None]
        if s_grad_ptr is not None:
            dx += tl.load(s_grad_ptr + row[:, None] * s_grad_stride + column[None, :], mask=real, other=0.0).to(ACC)
        tl.store(out_ptr + out, dx.to(out_ptr.dtype.element_ty), mask=real)
    if part_ptr is not None:
        part = part_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
        tl.store(part, weight_grad, mask=column_real)
        tl.store(part + WIDTH, bias_grad, mask=column_real)


@triton.jit(do_not_specialize=["parts"])
def sum_of_parts_kernel(
    part_ptr, first_ptr, second_ptr, parts, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FP64: tl.constexpr
):
    """parts [P, 1 or 2, WIDTH] -> their sums [WIDTH], one or two. One program: BLOCK_C columns of one of them, always in the same order."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    OUTS: tl.constexpr = 1 if second_ptr is None else 2
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_real = column < WIDTH
    which = tl.program_id(1)
    sums = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P).to(tl.int64)
        at = (part * OUTS + which)[:, None] * WIDTH + column[None, :]
        sums += tl.load(part_ptr + at, mask=(part < parts)[:, None] & column_real[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if which == 0:
        tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=column_real)
    elif second_ptr is not None:
        tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=column_real)
