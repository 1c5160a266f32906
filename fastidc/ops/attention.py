"""Self and cross attention over packed projections, head by head."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import attention as reference


def self_attention(qkv: Tensor, num_heads: int, *, causal: bool = False, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence.

    qkv [B, L, 3*H*D], queries, keys and values packed in this order; fp32, fp16, bf16 or fp64. ``causal`` hides later positions;
    ``dropout_p`` drops probabilities. Returns [B, L, H*D]. ValueError with the refusals where ``backend`` cannot serve.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    return _attend(q, k, v, num_heads, causal, dropout_p, backend)


def cross_attention(q: Tensor, kv: Tensor, num_heads: int, *, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """q [B, Lq, H*D], kv [B, Lk, 2*H*D], keys before values -> [B, Lq, H*D]; see `self_attention`."""
    k, v = kv.chunk(2, dim=-1)
    return _attend(q, k, v, num_heads, False, dropout_p, backend)


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, causal: bool, dropout_p: float, backend: str) -> Tensor:
    run = op(
        lambda: Spec(
            op="attention",
            device=q.device.type,
            dtype=q.dtype,
            grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad),
            head_dim=q.shape[-1] // num_heads,
            query_length=q.shape[1],
            key_length=k.shape[1],
            causal=causal,
            dropout=dropout_p > 0,
        ),
        backend,
    )
    return run(q, k, v, num_heads, causal, dropout_p)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*D] -> [B, H, L, D], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, num_heads: int, causal: bool, dropout_p: float) -> Tensor:
    out = F.scaled_dot_product_attention(*(_heads(x, num_heads) for x in (q, k, v)), is_causal=causal, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(2)


def _bmm(q: Tensor, k: Tensor, v: Tensor, num_heads: int, causal: bool, dropout_p: float) -> Tensor:
    """Two batched products and a softmax, the scores in memory."""
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, Lq, Lk]
    if causal:
        scores = scores + reference.causal_mask(scores.shape[-1], scores.dtype, scores.device)
    return (F.dropout(scores.softmax(dim=-1), dropout_p) @ v).transpose(1, 2).flatten(2)


def _reference(q: Tensor, k: Tensor, v: Tensor, num_heads: int, causal: bool, dropout_p: float) -> Tensor:
    mask = reference.causal_mask(k.shape[1], q.dtype, q.device) if causal else None
    return reference.attention(q, k, v, num_heads, mask)


op = Op(
    "attention",
    [
        Backend("sdpa", _sdpa),
        Backend("torch", _bmm),
        Backend("reference", _reference, lambda spec: ["it has no dropout."] if spec.dropout else []),
    ],
    order=lambda spec: ("sdpa", "torch"),
)
