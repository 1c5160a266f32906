"""Device code of `fastidc_kernels.quick_gelu`, whose docstring says what is computed."""

import triton
import triton.language as tl

_SLOPE = tl.constexpr(1.702)


@triton.jit(do_not_specialize=["rows"])
def quick_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: BLOCK_R rows of BLOCK_C columns; neighbouring programs have neighbouring columns."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    ACROSS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // ACROSS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % ACROSS) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_real = column < WIDTH
    real = (row < rows)[:, None] & column_real[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=real, other=0.0).to(ACC)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column_real, other=0.0).to(ACC)[None, :]
    y = x * tl.sigmoid(tl.full([], _SLOPE, ACC) * x)
    tl.store(y_ptr + row[:, None] * WIDTH + column[None, :], y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def quick_gelu_bwd_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    y_ptr,
    part_ptr,
    rows,
    grad_stride,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FP64: tl.constexpr,
):
    """One program: every n-th block of rows of its BLOCK_C columns, n programs to each such strip; its share of the bias's gradient stays in
    registers."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    ACROSS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    program, programs = tl.program_id(0) // ACROSS, tl.num_programs(0) // ACROSS
    column = (tl.program_id(0) % ACROSS) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_real = column < WIDTH
    slope = tl.full([], _SLOPE, ACC)
    bias_grad = tl.zeros([BLOCK_C], ACC)
    for block in range(program, tl.cdiv(rows, BLOCK_R), programs):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        real = (row < rows)[:, None] & column_real[None, :]
        out = row[:, None] * WIDTH + column[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=real, other=0.0).to(ACC)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, mask=column_real, other=0.0).to(ACC)[None, :]
        share = tl.sigmoid(slope * x)
        if y_ptr is not None:
            tl.store(y_ptr + out, (x * share).to(y_ptr.dtype.element_ty), mask=real)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=real, other=0.0).to(ACC)
        dx = grad * share * (1.0 + slope * x * (1.0 - share))
        tl.store(out_ptr + out, dx.to(out_ptr.dtype.element_ty), mask=real)
        if part_ptr is not None:
            bias_grad += tl.sum(dx, 0)
    if part_ptr is not None:
        tl.store(part_ptr + program.to(tl.int64) * WIDTH + column, bias_grad, mask=column_real)
