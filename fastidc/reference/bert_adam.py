"""BertAdam, the specification (clip4idc.md 5.1): Adam without bias correction, decay inside the update, first step at rate 0."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def warmup_cosine(x: float, warmup: float) -> float:
    """x in [0, 1]. A cosine over the whole range: at x = warmup it drops from 1 to 0.5 (1 + cos(pi warmup))."""
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))


def warmup_linear(x: float, warmup: float) -> float:
    return x / warmup if x < warmup else max((x - 1) / (warmup - 1), 0.0)


def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients in place to a global norm of at most ``max_norm`` and returns the norm they had."""
    norm = torch.stack([g.norm() for g in grads]).norm()
    for g in grads:
        g.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def bert_adam_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float | None,
) -> None:
    """One update of one parameter in place; grad, m, v have its shape. ``lr`` is the scheduled rate of this step."""
    grad = grad.clone()
    if max_norm is not None:
        clip_grad_norm([grad], max_norm)
    m.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    update = m / (v.sqrt() + eps)
    if weight_decay > 0:
        update = update + weight_decay * param
    param.sub_(lr * update)
