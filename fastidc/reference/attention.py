"""Multi-head attention, the specification."""

import torch
from torch import Tensor


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*D] -> [B, H, L, D]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, head by head.

    q [B, Lq, H*D]; k, v [B, Lk, H*D]; mask additive, broadcastable to [B, H, Lq, Lk]. Returns [B, Lq, H*D].
    """
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H, Lq, Lk]
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def causal_mask(length: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[L, L]: 0 on and below the diagonal, -inf above."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu(1)


def self_attention(qkv: Tensor, num_heads: int, causal: bool = False) -> Tensor:
    """qkv [B, L, 3*H*D] -> [B, L, H*D]."""
    q, k, v = qkv.chunk(3, dim=-1)
    return attention(q, k, v, num_heads, causal_mask(qkv.shape[1], qkv.dtype, qkv.device) if causal else None)


def cross_attention(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """q [B, Lq, H*D], kv [B, Lk, 2*H*D] -> [B, Lq, H*D]."""
    k, v = kv.chunk(2, dim=-1)
    return attention(q, k, v, num_heads)
