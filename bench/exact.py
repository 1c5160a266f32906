"""Truths in pieces, so that those of the largest shapes fit: the same functions as `fastidc.reference`, recomputed piece by piece in the
backward pass. In float64 they are the gate's truth; in a case's own dtype they are its yardstick: products in that dtype, statistics in
at least fp32, as PyTorch under autocast has it."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastidc.reference import attention as reference_attention

PIECE = 2**28  # elements of the largest intermediate


def _pieces(rows: int, elements_a_row: int) -> list[slice]:
    step = max(1, PIECE // max(1, elements_a_row))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _again(function, *inputs):
    """``function(*inputs)``, computed again in the backward pass instead of kept."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def info_nce(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """text, pair [B, E], logit_scale [] (a logarithm) -> scalar: the mean of both directions' cross entropies."""
    text, pair, scale = F.normalize(text, dim=-1), F.normalize(pair, dim=-1), logit_scale.exp()

    def statistics(rows: Tensor, scale: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        scores = _wide(scale * rows @ pair.T)
        return scores.logsumexp(1), scores.logsumexp(0)

    found = [_again(statistics, text[part], scale, pair) for part in _pieces(len(text), len(pair))]
    rows = torch.cat([row for row, _ in found])
    columns = torch.stack([column for _, column in found]).logsumexp(0)
    own = _wide(scale * text * pair).sum(-1)
    return (rows.mean() + columns.mean()) / 2 - own.mean()


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int = 0) -> Tensor:
    """x [N, D], weight [V, D], bias [V], targets [N] -> the mean over targets that are not ``ignore_index``; 0 where all are ignored."""

    def loss(rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(_wide(F.linear(rows, weight, bias)), targets, ignore_index=ignore_index, reduction="sum")

    total = sum(_again(loss, x[part], targets[part], weight, bias) for part in _pieces(len(x), len(weight)))
    return total / (targets != ignore_index).sum().clamp(min=1)


def padded(rows: Tensor, lengths: list[int], longest: int) -> Tensor:
    """rows [T, C] of packed sequences -> [S, longest, C], zeros behind each."""
    index = _places(lengths, longest, rows.device)
    return rows.new_zeros(len(lengths) * longest, rows.shape[1]).index_copy(0, index, rows).view(len(lengths), longest, -1)


def packed(x: Tensor, lengths: list[int]) -> Tensor:
    """[S, longest, C] -> [T, C]: the inverse of `padded`."""
    return x.flatten(0, 1)[_places(lengths, x.shape[1], x.device)]


def _places(lengths: list[int], longest: int, device: torch.device) -> Tensor:
    """Row of the padded tensor, flattened, for every packed token."""
    sizes = torch.tensor(lengths, device=device)
    row = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    within = torch.arange(len(row), device=device) - (sizes.cumsum(0) - sizes)[row]
    return row * longest + within


def ragged_attention(qkv: Tensor, lengths: list[int], longest: int, num_heads: int) -> Tensor:
    """qkv [T, 3*H*D] of packed causal sequences -> [T, H*D]. Causality makes padding exact."""
    return packed(reference_attention.self_attention(padded(qkv, lengths, longest), num_heads, True), lengths)


def adamw(params, grads, first_moments, second_moments, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, step=10) -> list[Tensor]:
    """The ``step``th step of decoupled AdamW with bias correction, not in place -> the new parameters."""
    new = []
    for p, g, m, v in zip(params, grads, first_moments, second_moments, strict=True):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        new.append(p * (1 - lr * weight_decay) - lr * update)
    return new


def clipped_adamw(params, grads, first_moments, second_moments, lr) -> list[Tensor]:
    """`adamw` of gradients scaled to a global norm of at most 1."""
    norm = torch.stack([g.norm() for g in grads]).norm()
    return adamw(params, [g * (1 / (norm + 1e-6)).clamp(max=1) for g in grads], first_moments, second_moments, lr)
