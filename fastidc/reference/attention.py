"""Multi-head attention, the specification."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*D] -> [B, H, L, D]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, head by head; with dropout, the probabilities that `kept` names, divided by 1 - dropout_p.

    q [B, Lq, H*D]; k, v [B, Lk, H*D]; mask additive, broadcastable to [B, H, Lq, Lk]; seed int64 [2]; first: the number of the first
    sequence, from which masks count. Returns [B, Lq, H*D].
    """
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H, Lq, Lk]
    if mask is not None:
        scores = scores + mask
    p = scores.softmax(dim=-1)
    if dropout_p:
        p = p * kept(seed, dropout_p, p.shape, first) / (1 - dropout_p)
    return (p @ v).transpose(1, 2).flatten(2)


def causal_mask(length: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[L, L]: 0 on and below the diagonal, -inf above."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu(1)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """q, k, v [T, H*D] of sequences end to end, sequence s in rows cu_seqlens[s] to cu_seqlens[s+1], one after another -> [T, H*D]."""
    ends, out = cu_seqlens.tolist(), []
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        mask = causal_mask(end - start, q.dtype, q.device) if causal else None
        out.append(attention(*(x[None, start:end] for x in (q, k, v)), num_heads, mask, dropout_p, seed, s)[0])
    return torch.cat(out) if out else q.new_empty(q.shape)


def kept(seed: Tensor, dropout_p: float, shape: Sequence[int], first: int = 0) -> Tensor:
    """Which probabilities dropout keeps, bool [B, H, Lq, Lk]: a function of seed (int64 [2], a seed and an offset) and of the place alone.

    Philox 4x32-10 with the seed as key and (head, sequence, offset) as counter gives a head two words; they and the place in the head go
    through murmur3's 32-bit finaliser, and what comes out below dropout_p * 2^32 is dropped. Lq, Lk <= 128.
    """
    batch, heads, rows, columns = shape
    device = seed.device
    key, offset = seed
    head = torch.arange(heads, device=device)[None, :].expand(batch, heads)
    sequence = torch.arange(first, first + batch, device=device)[:, None].expand(batch, heads)
    counter = [head, sequence, (offset & _WORD).expand(batch, heads), ((offset >> 32) & _WORD).expand(batch, heads)]
    a, b, _, _ = philox([c & _WORD for c in counter], [key & _WORD, (key >> 32) & _WORD])
    place = 128 * torch.arange(rows, device=device)[:, None] + torch.arange(columns, device=device)
    x = (_low(place, 0x9E3779B9) + a[..., None, None]) & _WORD
    x = _low(x ^ (x >> 16), 0x85EBCA6B)
    x = _low(x ^ b[..., None, None] ^ (x >> 13), 0xC2B2AE35)
    return (x ^ (x >> 16)) >= min(round(dropout_p * 2**32), 2**32 - 1)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al., SC 2011): four counter words and two key words, each in int64 below 2^32 -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        c0, c1, c2, c3 = _high(c2, 0xCD9E8D57) ^ c1 ^ k0, _low(c2, 0xCD9E8D57), _high(c0, 0xD2511F53) ^ c3 ^ k1, _low(c0, 0xD2511F53)
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


_WORD = 0xFFFFFFFF


def _low(x: Tensor, factor: int) -> Tensor:
    """The low word of x * factor; by halves, because the product of two words does not fit int64."""
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _WORD


def _high(x: Tensor, factor: int) -> Tensor:
    """The high word of x * factor."""
    return (x * (factor >> 16) + ((x * (factor & 0xFFFF)) >> 16)) >> 16


def self_attention(qkv: Tensor, num_heads: int, causal: bool = False) -> Tensor:
    """qkv [B, L, 3*H*D] -> [B, L, H*D]."""
    q, k, v = qkv.chunk(3, dim=-1)
    return attention(q, k, v, num_heads, causal_mask(qkv.shape[1], qkv.dtype, qkv.device) if causal else None)


def cross_attention(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """q [B, Lq, H*D], kv [B, Lk, 2*H*D] -> [B, Lq, H*D]."""
    k, v = kv.chunk(2, dim=-1)
    return attention(q, k, v, num_heads)
