"""Symmetric cosine InfoNCE, the specification (paper eq. 6 to 8; the mean of both directions is the official form, clip4idc.md 4)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce_logits(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """exp(logit_scale) cos(text_i, pair_j): text [T, E], pair [P, E], logit_scale [] -> [T, P]."""
    return logit_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(pair, dim=-1).T


def info_nce(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """text, pair [B, E], row i belongs to row i; logit_scale [] as CLIP stores it (a logarithm) -> scalar."""
    logits = info_nce_logits(text, pair, logit_scale)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
