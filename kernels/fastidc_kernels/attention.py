"""Softmax attention over sequences of at most 128 tokens, forward and backward: a whole row of scores is in one tile.

Because every row is complete where it is computed, there is no online softmax, no loop over keys, no saved statistics and no accumulator
in memory: the backward pass reads the projections and the upstream gradient, computes the probabilities again and writes each gradient
once. Queries, keys and values are read where the projection left them, whatever their strides, and gradients are written in the same
layout. One program serves HEADS neighbouring heads of one sequence.

Padding: rows past a sequence's end are read as zeros. A zero query row has a finite softmax over the real keys and a zero upstream
gradient, so it adds exactly nothing to any sum; only keys need a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastidc_kernels import _launch, _tiles

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(cu_seqlens, faults, sequence, sequences, longest, total_rows, first_head):
    """First row (int64) and length of a packed sequence.

    The offsets were made elsewhere and may be wrong. They are clamped, so that nothing outside the tensors is touched, and ``faults`` is set
    for the host to read when it next looks.
    """
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    wrong = (start < 0) | (end < start) | (end - start > longest) | (end > total_rows)
    wrong = wrong | ((sequence == 0) & (start != 0)) | ((sequence == sequences - 1) & (end != total_rows))
    tl.atomic_or(faults, 1, mask=wrong & first_head)
    length = tl.where((start < 0) | (end > total_rows), 0, tl.minimum(end - start, longest))
    return start, length.to(tl.int32)


@triton.jit
def _at(base, head, row, stride, HEAD_DIM: tl.constexpr):
    """Pointers to ``row`` of one head."""
    return base + head * HEAD_DIM + row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _visible(row, column, length, CAUSAL: tl.constexpr):
    """Which keys a query sees; row and column broadcast against each other."""
    if CAUSAL:
        return (column < length) & (column <= row)
    else:
        return (column < length) & (row >= 0)


@triton.jit
def _kept(seed, sequence, head, row, column, threshold):
    """Which probabilities dropout keeps: a function of (seed, offset, sequence, head, row, column) alone, so that the backward pass draws the same.

    Philox keys the head; within it murmur3's finaliser mixes the place, at a tenth of Philox's instructions an element.
    """
    offset = tl.load(seed + 1)
    low, high = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    a, b, _, _ = tl.philox(tl.load(seed), head.to(tl.uint32), sequence.to(tl.uint32), low, high)
    x = (row * 128 + column).to(tl.uint32) * 0x9E3779B9 + a
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = ((x ^ b) ^ (x >> 13)) * 0xC2B2AE35
    return (x ^ (x >> 16)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["sequences", "query_length", "key_length", "total_rows", "threshold"])
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens,
    seed,
    faults,
    sequences,
    query_length,
    key_length,
    total_rows,
    threshold,
    q_batch,
    q_row,
    kv_batch,
    kv_row,
    out_batch,
    out_row,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    FP64: tl.constexpr,
):
    """q, k, v -> out. One program: HEADS heads of one sequence, neighbouring programs neighbouring heads of the same rows."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    program = tl.program_id(0)
    sequence, group = program // GROUPS, program % GROUPS
    if PACKED:
        start, query_length = _span(cu_seqlens, faults, sequence, sequences, query_length, total_rows, group == 0)
        key_length = query_length
        q_start, kv_start, out_start = start * q_row, start * kv_row, start * out_row
    else:
        wide = sequence.to(tl.int64)
        q_start, kv_start, out_start = wide * q_batch, wide * kv_batch, wide * out_batch
    column = tl.arange(0, BLOCK_K)
    kv_real = (column < key_length)[:, None]
    for i in range(HEADS):
        head = group * HEADS + i
        k = tl.load(_at(k_ptr + kv_start, head, column, kv_row, HEAD_DIM), mask=kv_real, other=0.0)
        v = tl.load(_at(v_ptr + kv_start, head, column, kv_row, HEAD_DIM), mask=kv_real, other=0.0)
        for block in range(BLOCKS):
            row = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q_real = (row < query_length)[:, None]
            q = tl.load(_at(q_ptr + q_start, head, row, q_row, HEAD_DIM), mask=q_real, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)  # [queries, keys]
            scores = tl.where(_visible(row[:, None], column[None, :], key_length, CAUSAL), scores, float("-inf"))
            p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * tl.full([], _LOG2_E * HEAD_DIM**-0.5, ACC))
            total = tl.sum(p, 1)
            if KEEP < 1.0:
                p = tl.where(_kept(seed, sequence, head, row[:, None], column[None, :], threshold), p, 0.0)
                total = total * tl.full([], KEEP, ACC)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=ACC) / total[:, None]
            tl.store(_at(out_ptr + out_start, head, row, out_row, HEAD_DIM), out.to(out_ptr.dtype.element_ty), mask=q_real)


@triton.jit(do_not_specialize=["sequences", "query_length", "key_length", "total_rows", "threshold"])
def attention_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens,
    seed,
    faults,
    sequences,
    query_length,
    key_length,
    total_rows,
    threshold,
    q_batch,
    q_row,
    kv_batch,
    kv_row,
    grad_batch,
    grad_row,
    dq_batch,
    dq_row,
    dkv_batch,
    dkv_row,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    FP64: tl.constexpr,
):
    """q, k, v and the gradient of out -> dq, dk, dv. As in the forward pass; queries come in BLOCKS blocks, keys and values stay."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    program = tl.program_id(0)
    sequence, group = program // GROUPS, program % GROUPS
    if PACKED:
        start, query_length = _span(cu_seqlens, faults, sequence, sequences, query_length, total_rows, group == 0)
        key_length = query_length
        q_start, kv_start, grad_start = start * q_row, start * kv_row, start * grad_row
        dq_start, dkv_start = start * dq_row, start * dkv_row
    else:
        wide = sequence.to(tl.int64)
        q_start, kv_start, grad_start = wide * q_batch, wide * kv_batch, wide * grad_batch
        dq_start, dkv_start = wide * dq_batch, wide * dkv_batch
    column = tl.arange(0, BLOCK_K)
    kv_real = (column < key_length)[:, None]
    scale = tl.full([], HEAD_DIM**-0.5, ACC)
    for i in range(HEADS):
        head = group * HEADS + i
        k = tl.load(_at(k_ptr + kv_start, head, column, kv_row, HEAD_DIM), mask=kv_real, other=0.0)
        v = tl.load(_at(v_ptr + kv_start, head, column, kv_row, HEAD_DIM), mask=kv_real, other=0.0)
        dk = tl.zeros([BLOCK_K, HEAD_DIM], ACC)
        dv = tl.zeros([BLOCK_K, HEAD_DIM], ACC)
        for block in range(BLOCKS):
            row = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q_real = (row < query_length)[:, None]
            q = tl.load(_at(q_ptr + q_start, head, row, q_row, HEAD_DIM), mask=q_real, other=0.0)
            grad = tl.load(_at(grad_ptr + grad_start, head, row, grad_row, HEAD_DIM), mask=q_real, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC)  # [keys, queries]
            scores = tl.where(_visible(row[None, :], column[:, None], key_length, CAUSAL), scores, float("-inf"))
            p = tl.exp2((scores - tl.max(scores, 0)[None, :]) * tl.full([], _LOG2_E * HEAD_DIM**-0.5, ACC))
            p = p / tl.sum(p, 0)[None, :]
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee", out_dtype=ACC)
            if KEEP < 1.0:
                factor = tl.where(_kept(seed, sequence, head, row[None, :], column[:, None], threshold), tl.full([], 1 / KEEP, ACC), 0.0)
                dp = dp * factor
                used = p * factor
            else:
                used = p
            dv = tl.dot(used.to(grad.dtype), grad, dv, input_precision="ieee", out_dtype=ACC)
            ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee", out_dtype=ACC)
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee", out_dtype=ACC) * scale
            tl.store(_at(dq_ptr + dq_start, head, row, dq_row, HEAD_DIM), dq.to(dq_ptr.dtype.element_ty), mask=q_real)
        tl.store(_at(dk_ptr + dkv_start, head, column, dkv_row, HEAD_DIM), (dk * scale).to(dk_ptr.dtype.element_ty), mask=kv_real)
        tl.store(_at(dv_ptr + dkv_start, head, column, dkv_row, HEAD_DIM), dv.to(dv_ptr.dtype.element_ty), mask=kv_real)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    heads: int,
    *,
    causal: bool,
    cu_seqlens: Tensor | None,
    longest: int,
    dropout_p: float,
    seed: Tensor | None,
    faults: Tensor | None,
    tile: _tiles.AttentionTile | None = None,
) -> None:
    """Fills ``out``. q, out [B, Lq, H*D], k, v [B, Lk, H*D]; or, with ``cu_seqlens`` [S+1] int32, all [T, H*D] and ``longest`` tokens at most
    in a sequence. A row's numbers lie side by side, 128 rows less than 2^31 numbers apart; k and v have the same strides. seed: int64 [2]
    where dropout_p > 0; faults: int32 [1] where packed. tile: the table's where none is given."""
    facts, static, tile = _call(q, k, heads, causal, cu_seqlens, longest, dropout_p, False, tile)
    grid = (facts["sequences"] * static["GROUPS"],)
    if not grid[0] or not q.numel():
        return
    strides = (*_strides(q), *_strides(k), *_strides(out))
    tensors = (q, k, v, out, cu_seqlens, seed, faults)
    with _launch.on(q.device):
        attention_fwd_kernel[grid](*tensors, *facts.values(), *strides, **static, **_launch.options(tile))


def attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    heads: int,
    *,
    causal: bool,
    cu_seqlens: Tensor | None,
    longest: int,
    dropout_p: float,
    seed: Tensor | None,
    faults: Tensor | None,
    tile: _tiles.AttentionTile | None = None,
) -> None:
    """Fills dq, dk, dv, of the shapes of q, k, v; ``grad`` is out's gradient. The rest as in `attention_fwd`; dk and dv share their strides."""
    facts, static, tile = _call(q, k, heads, causal, cu_seqlens, longest, dropout_p, True, tile)
    grid = (facts["sequences"] * static["GROUPS"],)
    if not grid[0] or not q.numel():
        return
    strides = (*_strides(q), *_strides(k), *_strides(grad), *_strides(dq), *_strides(dk))
    tensors = (q, k, v, grad, dq, dk, dv, cu_seqlens, seed, faults)
    with _launch.on(q.device):
        attention_bwd_kernel[grid](*tensors, *facts.values(), *strides, **static, **_launch.options(tile))


def _strides(x: Tensor) -> tuple[int, int]:
    """Of a sequence and of a row."""
    return (x.stride(0), x.stride(1)) if x.dim() == 3 else (0, x.stride(0))


def _call(q, k, heads, causal, cu_seqlens, longest, dropout_p, backward, tile):
    """A launch's run-time facts, in the kernels' order, its constants, and its tile."""
    packed = cu_seqlens is not None
    query_length, key_length = (longest, longest) if packed else (q.shape[1], k.shape[1])
    head_dim = q.shape[-1] // heads
    if tile is None:
        # the interpreter, whatever its dtype, walks the blocks that half precision has on Hopper
        item_bytes = q.element_size() if q.is_cuda else 2
        tile = _tiles.attention(query_length, key_length, head_dim, item_bytes, dropout_p > 0, backward, _launch.arch(q.device))
    per_program = tile.heads if heads % tile.heads == 0 else 1
    facts = {
        "sequences": len(cu_seqlens) - 1 if packed else len(q),
        "query_length": query_length,
        "key_length": key_length,
        "total_rows": len(q) if packed else 0,
        "threshold": min(round(dropout_p * 2**32), 2**32 - 1),
    }
    static = {
        "GROUPS": heads // per_program,
        "HEADS": per_program,
        "HEAD_DIM": head_dim,
        "BLOCK_Q": tile.block_q,
        "BLOCKS": tile.blocks,
        "BLOCK_K": tile.block_k,
        "CAUSAL": causal,
        "PACKED": packed,
        "KEEP": 1.0 - dropout_p,
        "FP64": q.dtype == torch.float64,
    }
    return facts, static, tile
