"""One BertAdam step over many parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import bert_adam as reference


@torch.no_grad()
def bert_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    max_norm: float | None = 1.0,
    backend: str = "auto",
) -> None:
    """Updates ``params`` and both moments in place; ``grads`` are clipped tensor by tensor to ``max_norm`` (None: not at all) and may be overwritten.

    Adam without bias correction, u = m / (sqrt(v) + eps), decoupled decay inside the update, p -= lr (u + weight_decay p)
    (clip4idc.md 5.1). All four sequences have the same length and shapes; ``lr`` is the scheduled rate of this step.

    A parameter's gradient and moments have its dtype. In fp16 every intermediate is rounded to fp16, in the official order: v, eps and
    lr * u underflow there, and what comes out is another optimiser (clip4idc.md 5.4), reproduced on purpose.
    """
    for dtype in dict.fromkeys(p.dtype for p in params):
        tensors = [
            [t for t, p in zip(part, params, strict=True) if p.dtype == dtype] for part in (params, grads, first_moments, second_moments)
        ]
        run = op(Spec("bert_adam", params[0].device.type, dtype, False), backend)
        run(*tensors, lr, betas, eps, weight_decay, max_norm)


# Adam's bias corrections are 1 - beta^step: after so many steps both are 1 to the last bit, which is what BertAdam computes at every step.
_UNCORRECTED = 1e9


def _torch(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay, max_norm) -> None:
    """torch's fused AdamW, whose decay p (1 - lr wd) - lr u is BertAdam's p - lr (u + wd p): one pass over the memory."""
    if max_norm is not None:
        scales = torch._foreach_norm(grads)
        torch._foreach_add_(scales, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, max_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(grads, scales)
    if params[0].dtype.itemsize < 4:
        return _foreach_half(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay)
    steps = [torch.full((), _UNCORRECTED, device=params[0].device)] * len(params)
    torch._fused_adamw_(
        params,
        grads,
        first_moments,
        second_moments,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _foreach_half(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay) -> None:
    """The official sequence of operations, each result rounded to fp16, factors not.

    Written with out-of-place products alone: in-place ones and ``alpha`` round the factor itself to fp16 on a CPU (1e-7 becomes 1.19e-7).
    1 / eps, which the other path multiplies by, is infinite in fp16.
    """
    torch._foreach_copy_(first_moments, torch._foreach_mul(first_moments, betas[0]))
    torch._foreach_add_(first_moments, torch._foreach_mul(grads, 1 - betas[0]))
    torch._foreach_copy_(second_moments, torch._foreach_mul(second_moments, betas[1]))
    torch._foreach_addcmul_(second_moments, grads, grads, 1 - betas[1])
    denominator = torch._foreach_add(torch._foreach_sqrt(second_moments), eps)
    update = torch._foreach_div(first_moments, denominator)
    if weight_decay > 0:
        torch._foreach_add_(update, torch._foreach_mul(params, weight_decay))
    torch._foreach_sub_(params, torch._foreach_mul(update, lr))


def _reference(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay, max_norm) -> None:
    for param, grad, m, v in zip(params, grads, first_moments, second_moments, strict=True):
        reference.bert_adam_step(param, grad, m, v, lr, betas, eps, weight_decay, max_norm)


op = Op("bert_adam", [Backend("torch", _torch), Backend("reference", _reference)], order=lambda spec: ("torch",))
