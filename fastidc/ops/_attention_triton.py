"""The one-tile kernels of `fastidc_kernels.attention` as registered ops: known to autograd, to torch.compile and to tensors without data."""

import functools

import torch
from torch import Tensor

from fastidc.ops._dispatch import Spec
from fastidc.ops._flags import Flag
from fastidc.ops._triton import refusals
from fastidc_kernels import _tiles


def unsupported(spec: Spec) -> list[str]:
    """Why the kernels cannot serve, in sentences."""
    out = refusals(spec)
    if spec.head_dim not in _tiles.HEAD_DIMS:
        out.append(f"a head must have {', '.join(map(str, _tiles.HEAD_DIMS[:-1]))} or {_tiles.HEAD_DIMS[-1]} numbers.")
    elif spec.dtype == torch.float32 and spec.head_dim > 64:
        out.append(f"in fp32 a head may have 64 numbers at most, not {spec.head_dim}: a tile of more does not fit a multiprocessor.")
    longest, shortest = max(spec.query_length, spec.key_length), min(spec.query_length, spec.key_length)
    if longest > _tiles.LONGEST or shortest < 1:
        out.append(f"one tile holds 1 to {_tiles.LONGEST} tokens, and here are {'more' if longest > _tiles.LONGEST else 'none'}.")
    return out


def attention(x: Tensor, memory: Tensor | None, call) -> Tensor:
    """``call``: a `fastidc.ops.attention.Call`."""
    seed = call.seed
    if call.dropout_p and seed is None:
        seed = new_seed(x.device)
    if memory is not None:
        return cross_attention_fwd(x, memory, call.num_heads, call.dropout_p, seed)
    return self_attention_fwd(x, call.num_heads, call.causal, call.cu_seqlens, call.max_seqlen, call.dropout_p, seed)


def new_seed(device: torch.device) -> Tensor:
    """A seed and an offset from torch's generator of ``device``: in a captured graph every replay draws anew."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=device)


# ---- wrong offsets on a device

faults = Flag()


# ---- registered ops


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: a row's numbers side by side, and a sequence's rows within 2^31 numbers, for offsets in it are 32 bits wide
    (offsets of sequences are 64)."""
    return x if x.stride(-1) == 1 and _tiles.LONGEST * x.stride(-2) < 2**31 else x.contiguous()


def _options(causal: bool, cu_seqlens: Tensor | None, max_seqlen: int, dropout_p: float, seed: Tensor | None, device: torch.device) -> dict:
    options = {"causal": causal, "longest": max_seqlen, "dropout_p": dropout_p}
    options["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.contiguous()
    options["faults"] = None if cu_seqlens is None else faults.on(device)
    options["seed"] = seed.contiguous() if dropout_p else None
    return options


@functools.cache
def _kernels():
    """Imported when first needed: importing fastidc imports no Triton."""
    from fastidc_kernels import attention as kernels

    return kernels


@torch.library.custom_op("fastidc::self_attention_fwd", mutates_args=())
def self_attention_fwd(
    qkv: Tensor, num_heads: int, causal: bool, cu_seqlens: Tensor | None, max_seqlen: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    qkv = _readable(qkv)
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    options = _options(causal, cu_seqlens, max_seqlen, dropout_p, seed, qkv.device)
    _kernels().attention_fwd(*qkv.chunk(3, -1), out, num_heads, **options)
    return out


@self_attention_fwd.register_fake
def _(qkv, num_heads, causal, cu_seqlens, max_seqlen, dropout_p, seed):
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


@torch.library.custom_op("fastidc::self_attention_bwd", mutates_args=())
def self_attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    qkv = _readable(qkv)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    options = _options(causal, cu_seqlens, max_seqlen, dropout_p, seed, qkv.device)
    _kernels().attention_bwd(*qkv.chunk(3, -1), _readable(grad), *dqkv.chunk(3, -1), num_heads, **options)
    return dqkv


@self_attention_bwd.register_fake
def _(grad, qkv, num_heads, causal, cu_seqlens, max_seqlen, dropout_p, seed):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_self(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.causal, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, cu_seqlens, seed)


def _self_gradient(ctx, grad):
    qkv, cu_seqlens, seed = ctx.saved_tensors
    dqkv = self_attention_bwd(grad, qkv, ctx.num_heads, ctx.causal, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed)
    return dqkv, None, None, None, None, None, None


self_attention_fwd.register_autograd(_self_gradient, setup_context=_save_self)


@torch.library.custom_op("fastidc::cross_attention_fwd", mutates_args=())
def cross_attention_fwd(q: Tensor, kv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    q, kv = _readable(q), _readable(kv)
    out = q.new_empty(q.shape)
    _kernels().attention_fwd(q, *kv.chunk(2, -1), out, num_heads, **_options(False, None, 0, dropout_p, seed, q.device))
    return out


@cross_attention_fwd.register_fake
def _(q, kv, num_heads, dropout_p, seed):
    return q.new_empty(q.shape)


@torch.library.custom_op("fastidc::cross_attention_bwd", mutates_args=())
def cross_attention_bwd(
    grad: Tensor, q: Tensor, kv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, kv = _readable(q), _readable(kv)
    dq, dkv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv))
    options = _options(False, None, 0, dropout_p, seed, q.device)
    _kernels().attention_bwd(q, *kv.chunk(2, -1), _readable(grad), dq, *dkv.chunk(2, -1), num_heads, **options)
    return dq, dkv


@cross_attention_bwd.register_fake
def _(grad, q, kv, num_heads, dropout_p, seed):
    return torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(kv, memory_format=torch.contiguous_format)


def _save_cross(ctx, inputs, output):
    q, kv, ctx.num_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, kv, seed)


def _cross_gradient(ctx, grad):
    q, kv, seed = ctx.saved_tensors
    dq, dkv = cross_attention_bwd(grad, q, kv, ctx.num_heads, ctx.dropout_p, seed)
    return dq, dkv, None, None, None


cross_attention_fwd.register_autograd(_cross_gradient, setup_context=_save_cross)
