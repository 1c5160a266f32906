"""Device code of `fastidc_kernels.bert_adam`, whose docstring says what is computed and what every name means."""

import triton
import triton.language as tl

FACTS = 7  # numbers of a group
_FACTS = tl.constexpr(FACTS)
_EPS = tl.constexpr(1e-6)  # of clip_grad_norm_


@triton.jit
def _place(chunk_ptr, size_ptr, CHUNK: tl.constexpr):
    """The program's tensor, its first element there, and how many are the program's."""
    program = tl.program_id(0)
    tensor = tl.load(chunk_ptr + 2 * program)
    start = tl.load(chunk_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(size_ptr + tensor) - start, CHUNK).to(tl.int32)
    return tensor, start, count


@triton.jit
def _at(address, start, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Pointer to the element ``start`` at ``address``. WIDE: the address is a multiple of 16, in a form that the compiler sees too; a mere hint
    would hold for the other branch as well."""
    if WIDE:
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(TYPE)), 16) + start
    else:
        return address.to(tl.pointer_type(TYPE)) + start


@triton.jit
def _read(base, place, count, WIDE: tl.constexpr):
    if WIDE:
        return tl.load(base + place).to(tl.float32)
    else:
        return tl.load(base + place, mask=place < count, other=0.0).to(tl.float32)


@triton.jit
def _write(base, place, x, count, WIDE: tl.constexpr):
    x = x.to(base.dtype.element_ty)
    if WIDE:
        tl.store(base + place, x)
    else:
        tl.store(base + place, x, mask=place < count)


@triton.jit
def _squares(address, start, count, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    base = _at(address, start, TYPE, WIDE)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, CHUNK if WIDE else count, BLOCK):
        x = _read(base, first + tl.arange(0, BLOCK), count, WIDE)
        sums += x * x
    return tl.sum(sums, 0)


@triton.jit
def bert_adam_norms_kernel(chunk_ptr, size_ptr, grad_table, partial_ptr, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the sum of squares of one chunk of one gradient."""
    TYPE: tl.constexpr = tl.float32 if GRAD == "fp32" else tl.float16 if GRAD == "fp16" else tl.bfloat16
    tensor, start, count = _place(chunk_ptr, size_ptr, CHUNK)
    address = tl.load(grad_table + tensor)
    if (count == CHUNK) & (address % 16 == 0):
        total = _squares(address, start, count, TYPE, CHUNK, BLOCK, True)
    else:
        total = _squares(address, start, count, TYPE, CHUNK, BLOCK, False)
    tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def bert_adam_sums_kernel(first_ptr, partial_ptr, sum_ptr, BLOCK: tl.constexpr):
    """One program: the sum of squares of one gradient, its chunks in a fixed order."""
    tensor = tl.program_id(0)
    last = tl.load(first_ptr + tensor + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(tl.load(first_ptr + tensor), last, BLOCK):
        chunk = at + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + chunk, mask=chunk < last, other=0.0)
    tl.store(sum_ptr + tensor, tl.sum(total, 0))


@triton.jit(do_not_specialize=["clip_norm", "tensors"])
def bert_adam_scales_kernel(
    sum_ptr, group_ptr, fact_ptr, given_ptr, scale_ptr, norm_ptr, skip_ptr, skipped_ptr, clip_norm, tensors, BLOCK: tl.constexpr
):
    """One program: the global norm, what each gradient is multiplied by, and whether the update is left out. sum_ptr None: nothing is clipped."""
    factor = tl.full([], 1.0, tl.float32)
    if given_ptr is not None:
        norm = tl.load(given_ptr).to(tl.float32)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for at in range(0, tensors, BLOCK):
            tensor = at + tl.arange(0, BLOCK)
            total += tl.load(sum_ptr + tensor, mask=tensor < tensors, other=0.0)
        norm = tl.sqrt(tl.sum(total, 0))
        factor = tl.minimum(clip_norm / (norm + _EPS), 1.0)
    for at in range(0, tensors, BLOCK):
        tensor = at + tl.arange(0, BLOCK)
        real = tensor < tensors
        scale = tl.zeros([BLOCK], tl.float32) + factor
        if sum_ptr is not None:
            limit = tl.load(fact_ptr + tl.load(group_ptr + tensor, mask=real, other=0) * _FACTS + 6, mask=real, other=1.0)
            own = tl.sqrt(tl.load(sum_ptr + tensor, mask=real, other=0.0)) * factor
            scale = factor * tl.minimum(limit / (own + _EPS), 1.0)
        tl.store(scale_ptr + tensor, scale, mask=real)
    skip = tl.where(norm < float("inf"), 0, 1)  # a NaN is not less than anything
    tl.store(norm_ptr, norm)
    tl.store(skip_ptr, skip)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + skip)


@triton.jit
def _update(
    grad,
    param,
    first,
    second,
    shadow,
    start,
    count,
    scale,
    rate,
    ceiling,
    fact_ptr,
    TYPE: tl.constexpr,
    SHADOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    beta1, rest1, beta2, rest2 = tl.load(fact_ptr), tl.load(fact_ptr + 1), tl.load(fact_ptr + 2), tl.load(fact_ptr + 3)
    eps, decay = tl.load(fact_ptr + 4), tl.load(fact_ptr + 5)
    grad_at = _at(grad, start, TYPE, WIDE)
    param_at = _at(param, start, tl.float32, WIDE)
    first_at = _at(first, start, tl.float32, WIDE)
    second_at = _at(second, start, tl.float32, WIDE)
    for begin in range(0, CHUNK if WIDE else count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        g = _read(grad_at, place, count, WIDE) * scale
        p = _read(param_at, place, count, WIDE)
        m = beta1 * _read(first_at, place, count, WIDE) + rest1 * g
        v = beta2 * _read(second_at, place, count, WIDE) + rest2 * g * g
        p -= rate * (m / (tl.sqrt(v) + eps) + decay * p)
        p = tl.where(p > ceiling, ceiling, p)  # a NaN stays
        _write(param_at, place, p, count, WIDE)
        _write(first_at, place, m, count, WIDE)
        _write(second_at, place, v, count, WIDE)
        if SHADOW != "none":
            KEPT: tl.constexpr = tl.float16 if SHADOW == "fp16" else tl.bfloat16
            if shadow != 0:
                _write(_at(shadow, start, KEPT, WIDE), place, p, count, WIDE)


@triton.jit
def bert_adam_update_kernel(
    chunk_ptr,
    size_ptr,
    grad_table,
    param_table,
    first_table,
    second_table,
    shadow_table,
    ceiling_ptr,
    group_ptr,
    fact_ptr,
    rate_ptr,
    scale_ptr,
    skip_ptr,
    GRAD: tl.constexpr,
    SHADOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the update of one chunk of one parameter, unless it is left out."""
    TYPE: tl.constexpr = tl.float32 if GRAD == "fp32" else tl.float16 if GRAD == "fp16" else tl.bfloat16
    if tl.load(skip_ptr) != 0:
        return
    tensor, start, count = _place(chunk_ptr, size_ptr, CHUNK)
    grad, param = tl.load(grad_table + tensor), tl.load(param_table + tensor)
    first, second, shadow = tl.load(first_table + tensor), tl.load(second_table + tensor), tl.load(shadow_table + tensor)
    group = tl.load(group_ptr + tensor)
    facts = fact_ptr + group * _FACTS
    scale, rate, ceiling = tl.load(scale_ptr + tensor), tl.load(rate_ptr + group), tl.load(ceiling_ptr + tensor)
    if (count == CHUNK) & ((grad | param | first | second | shadow) % 16 == 0):
        _update(grad, param, first, second, shadow, start, count, scale, rate, ceiling, facts, TYPE, SHADOW, CHUNK, BLOCK, True)
    else:
        _update(grad, param, first, second, shadow, start, count, scale, rate, ceiling, facts, TYPE, SHADOW, CHUNK, BLOCK, False)
