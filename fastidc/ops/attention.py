"""Self and cross attention over packed projections, head by head."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops import _attention_triton as triton_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of, head_size, rounded
from fastidc.reference import attention as reference
from fastidc_kernels import _runtime


class Call(NamedTuple):
    """What a backend is told besides the projections; see `self_attention`."""

    num_heads: int
    causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    dropout_p: float = 0.0
    seed: Tensor | None = None


def self_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence (paper eq. 1 and 2; clip4idc.md 1.1).

    qkv: [B, L, 3*H*D], queries, keys and values packed in this order; fp32, fp16, bf16 or fp64. Or [T, 3*H*D], S sequences end to end without
    padding: sequence s is rows cu_seqlens[s] to cu_seqlens[s+1] (int32 [S+1], on qkv's device, from 0 to T), none of more than ``max_seqlen``
    rows; sequences of no rows are fine. ``causal`` hides later positions.

    ``dropout_p`` drops probabilities. ``seed``: int64 [2] on qkv's device, a seed and an offset; the same numbers draw the same mask, and
    where it is None they are drawn from torch's generator. Returns [B, L, H*D] or [T, H*D]. ValueError, in sentences, for arguments
    that do not fit and where ``backend`` cannot serve. Offsets on a GPU are not read by the host: wrong ones touch nothing outside the
    tensors, and `raise_faults` reports them later.
    """
    qkv = _as_autocast(qkv)
    _check("qkv", qkv, 3, num_heads)
    call = Call(num_heads, causal, cu_seqlens, max_seqlen or 0, dropout_p, seed)
    _check_call(call, qkv)
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, max_seqlen, qkv)
    elif qkv.dim() != 3:
        raise ValueError(f"qkv must be [B, L, 3*H*D], got {list(qkv.shape)}; sequences end to end need cu_seqlens and max_seqlen.")
    elif max_seqlen is not None:
        raise ValueError("max_seqlen belongs to packed sequences; give cu_seqlens with it, or neither.")
    length = qkv.shape[1] if cu_seqlens is None else max_seqlen
    return op(_spec(call, qkv, qkv.shape[-1] // 3, length, length, qkv.requires_grad), backend)(qkv, None, call)


def cross_attention(
    q: Tensor, kv: Tensor, num_heads: int, *, dropout_p: float = 0.0, seed: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """q [B, Lq, H*D], kv [B, Lk, 2*H*D], keys before values -> [B, Lq, H*D]; see `self_attention`."""
    q, kv = _as_autocast(q), _as_autocast(kv)
    _check("q", q, 1, num_heads)
    _check("kv", kv, 2, num_heads)
    if q.dim() != 3 or kv.dim() != 3 or len(q) != len(kv) or 2 * q.shape[-1] != kv.shape[-1]:
        raise ValueError(f"q must be [B, Lq, H*D] and kv [B, Lk, 2*H*D], got {list(q.shape)} and {list(kv.shape)}.")
    if q.dtype != kv.dtype or q.device != kv.device:
        raise ValueError(f"q and kv must have one dtype and device, got {q.dtype} on {q.device} and {kv.dtype} on {kv.device}.")
    call = Call(num_heads, dropout_p=dropout_p, seed=seed)
    _check_call(call, q)
    grad = q.requires_grad or kv.requires_grad
    return op(_spec(call, q, q.shape[-1], q.shape[1], kv.shape[1], grad), backend)(q, kv, call)


def _as_autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to attention, whichever backend serves."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _spec(call: Call, q: Tensor, width: int, query_length: int, key_length: int, grad: bool) -> Spec:
    dropout = False
    if call.dropout_p > 0:  # branched on: the compiler may hold the number itself as a symbol
        dropout = True
    return Spec(
        op="attention",
        device=q.device.type,
        dtype=q.dtype,
        grad=torch.is_grad_enabled() and grad,
        arch=arch_of(q.device),
        head_dim=head_size(width // call.num_heads),
        query_length=rounded(query_length),
        key_length=rounded(key_length),
        causal=call.causal,
        dropout=dropout,
        packed=call.cu_seqlens is not None,
        seeded=call.seed is not None,
    )


# ---- what does not fit


def _check(name: str, x: Tensor, parts: int, num_heads: int) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} must have two or three dimensions, got {list(x.shape)}.")
    if num_heads < 1 or x.shape[-1] % (parts * num_heads):
        each = "" if parts == 1 else f" in {parts} equal parts"
        raise ValueError(f"{name} has {x.shape[-1]} numbers a row, which {num_heads} heads cannot share out evenly{each}.")


def _check_call(call: Call, x: Tensor) -> None:
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {call.dropout_p}.")
    seed = call.seed
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (2,) or seed.device != x.device):
        raise ValueError(f"seed must be int64 [2] on {x.device}, got {seed.dtype} {list(seed.shape)} on {seed.device}.")


def _check_offsets(cu_seqlens: Tensor, max_seqlen: int | None, qkv: Tensor) -> None:
    if qkv.dim() != 2:
        raise ValueError(f"with cu_seqlens, qkv must be [T, 3*H*D], got {list(qkv.shape)}.")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be int32 [S+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}.")
    if len(cu_seqlens) == 1 and len(qkv):
        raise ValueError(f"cu_seqlens names no sequence, and qkv has {len(qkv)} rows.")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and qkv on {qkv.device}; move it there once, with the batch.")
    if max_seqlen is None or max_seqlen < 1:
        raise ValueError(f"cu_seqlens needs max_seqlen, the rows of the longest sequence, got {max_seqlen}.")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return  # values that the host cannot read; `raise_faults` tells
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}.")
    lengths = cu_seqlens.diff()
    if len(lengths) and int(lengths.min()) < 0:
        at = int((lengths < 0).nonzero()[0])
        raise ValueError(f"cu_seqlens must ascend, got {int(cu_seqlens[at])} before {int(cu_seqlens[at + 1])} at index {at + 1}.")
    if int(cu_seqlens[-1]) != len(qkv):
        raise ValueError(f"cu_seqlens must end at the number of rows, {len(qkv)}, got {int(cu_seqlens[-1])}.")
    if len(lengths) and int(lengths.max()) > max_seqlen:
        raise ValueError(f"sequence {int(lengths.argmax())} has {int(lengths.max())} rows, more than max_seqlen {max_seqlen}.")


# ---- backends of torch and xformers


def _parts(x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.chunk(3, dim=-1) if memory is None else (x, *memory.chunk(2, dim=-1))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*D] -> [B, H, L, D], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _unpacked(run):
    """``run(x, memory, call, hidden)`` made to serve packed sequences too: padded, attended and packed again. ``hidden``: None, or [S, L] bool,
    true where a key is padding; causal attention needs none, since padding comes last."""

    def serve(x: Tensor, memory: Tensor | None, call: Call) -> Tensor:
        if call.cu_seqlens is None:
            return run(x, memory, call, None)
        row = torch.arange(len(x), device=x.device, dtype=torch.int32)
        sequence = torch.searchsorted(call.cu_seqlens[1:], row, right=True)
        place = (sequence, row - call.cu_seqlens[sequence])
        padded = x.new_zeros(len(call.cu_seqlens) - 1, call.max_seqlen, x.shape[-1]).index_put(place, x)
        lengths = call.cu_seqlens.diff()[:, None]
        hidden = None if call.causal else torch.arange(call.max_seqlen, device=x.device) >= lengths
        return run(padded, None, call, hidden)[place]

    return serve


@_unpacked
def _sdpa(x: Tensor, memory: Tensor | None, call: Call, hidden: Tensor | None) -> Tensor:
    q, k, v = (_heads(part, call.num_heads) for part in _parts(x, memory))
    mask = None if hidden is None else ~hidden[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=call.causal, dropout_p=call.dropout_p)
    return out.transpose(1, 2).flatten(2)


@_unpacked
def _bmm(x: Tensor, memory: Tensor | None, call: Call, hidden: Tensor | None) -> Tensor:
    """Two batched products and a softmax, the scores in memory."""
    q, k, v = (_heads(part, call.num_heads) for part in _parts(x, memory))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, Lq, Lk]
    if call.causal:
        scores = scores + reference.causal_mask(scores.shape[-1], scores.dtype, scores.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    return (F.dropout(scores.softmax(dim=-1), call.dropout_p) @ v).transpose(1, 2).flatten(2)


def _xformers(x: Tensor, memory: Tensor | None, call: Call) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (part.unflatten(-1, (call.num_heads, -1)) for part in _parts(x, memory))
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if call.causal else None, p=call.dropout_p).flatten(2)


def _reference(x: Tensor, memory: Tensor | None, call: Call) -> Tensor:
    q, k, v = _parts(x, memory)
    if call.dropout_p and call.seed is None:
        call = call._replace(seed=triton_backend.new_seed(x.device))
    dropout = (call.dropout_p, call.seed)
    if call.cu_seqlens is not None:
        return reference.packed_attention(q, k, v, call.num_heads, call.cu_seqlens, call.causal, *dropout)
    mask = reference.causal_mask(k.shape[1], q.dtype, q.device) if call.causal else None
    return reference.attention(q, k, v, call.num_heads, mask, *dropout)


def _own_generator(spec: Spec) -> list[str]:
    return ["it draws dropout from torch's own generator and takes no seed."] if spec.seeded and spec.dropout else []


def _without_xformers(spec: Spec) -> list[str]:
    out = [missing] if (missing := _runtime.missing("xformers")) else []
    if spec.device != "cuda":
        out.append(f"it runs on CUDA, not on {spec.device}.")
    if spec.dtype == torch.float64:
        out.append("it takes fp32, fp16 and bf16.")
    if spec.packed:
        out.append("its packed masks want every length on the host.")
    return out + _own_generator(spec)


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: the one-tile kernel goes first where its arithmetic says so, in half precision up to 128 tokens
    (the library's tiles of 128 rows waste 1.6 to 84 times the products there). In fp32 neither has tensor cores, and torch's goes first."""
    first = ("triton", "sdpa") if spec.device == "cuda" and spec.dtype in (torch.float16, torch.bfloat16) else ("sdpa", "triton")
    return (*first, "torch")


op = Op(
    "attention",
    [
        Backend("triton", triton_backend.attention, triton_backend.unsupported),
        Backend("sdpa", _sdpa, _own_generator),
        Backend("xformers", _xformers, _without_xformers),
        Backend("torch", _bmm, _own_generator),
        Backend("reference", _reference),
    ],
    order=_order,
)
