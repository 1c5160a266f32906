"""BertAdam over many parameters: one step of one group, or of an optimiser's groups with the norm, the clips and what is left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastidc.errors import FastidcError
from fastidc.ops import _bert_adam_triton as triton_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of
from fastidc.reference import bert_adam as reference


@dataclass(frozen=True)
class BertAdamGroup:
    """Tensors that share their constants: sequences of one length, alike in shape from place to place. Moments have the parameter's dtype.

    ``max_norm``: what the norm of each gradient is clipped to after the global clip (None: not at all). ``shadows``: bf16 or fp16 tensors that
    hold the rounded parameters after the step, None in the place of a parameter without one.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    first_moments: Sequence[Tensor]
    second_moments: Sequence[Tensor]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    max_norm: float | None = None
    shadows: Sequence[Tensor | None] | None = None


class BertAdamStep:
    """One optimiser's steps: Adam without bias correction, u = m / (sqrt(v) + eps), decoupled decay inside the update,
    p -= lr (u + weight_decay p), after a clip of all gradients together and one of each (clip4idc.md 5.1).

    Where the norm of all gradients is not finite a step changes neither weights nor moments, and `skipped` counts it. A GPU is not waited for.
    """

    def __init__(self) -> None:
        self._tables = triton_backend.Tables()
        self._skipped: dict[torch.device, Tensor] = {}

    @property
    def skipped(self) -> int:
        """Steps left out so far. Waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    @torch.no_grad()
    def __call__(
        self,
        groups: Sequence[BertAdamGroup],
        lrs: Sequence[float] | Tensor,
        *,
        clip_norm: float | None = None,
        norm: Tensor | None = None,
        ceiling: tuple[Tensor, float] | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Updates parameters and moments in place and returns the norm that all gradients together had before the clip, fp32 [].

        lrs: each group's scheduled rate, numbers, or fp32 [G] on the device, which is what a captured graph reads again at every replay
        (not for parameters in half precision).
        clip_norm: what the norm of all gradients is clipped to. norm []: that norm where it is known already, as where a process has a part of
        each gradient; then nothing is clipped to it. ceiling: a tensor and what no element of it exceeds afterwards. Gradients may be
        overwritten, and those of fp32 parameters may be fp32, fp16 or bf16, also some so and some so: "triton" reads them as they are, the other
        backends bring them to fp32 first. Parameters that are not fp32 are for "torch".
        """
        _check(groups, lrs)
        params = [p for group in groups for p in group.params]
        if not params:
            _lower(ceiling)
            return torch.zeros(()) if norm is None else norm
        device = params[0].device
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), device=device)
        run = op.backends[_serving(params, backend)].run
        if run is not _triton:
            groups = [replace(group, grads=_as_parameters(group)) for group in groups]
        norm = run(groups, lrs, clip_norm, norm, ceiling, self._skipped[device], self._tables)
        # neither our kernels nor torch's fused optimisers count what they write, and whoever watches a parameter's version is to see it
        torch.autograd.graph.increment_version(params)
        return norm


_steps: dict[torch.device, BertAdamStep] = {}  # of `bert_adam`, whose tables serve as long as the same tensors come


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
    """One step of one group, as `BertAdamStep` makes it: updates ``params`` and both moments in place, unless a gradient is not finite.

    ``grads`` are clipped tensor by tensor to ``max_norm`` (None: not at all) and may be overwritten. All four sequences have the same length and
    shapes; ``lr`` is the scheduled rate of this step.

    A parameter's gradient and moments have its dtype. In fp16 every intermediate is rounded to fp16, in the official order: v, eps and
    lr * u underflow there, and what comes out is another optimiser (clip4idc.md 5.4), reproduced on purpose.
    """
    group = BertAdamGroup(params, grads, first_moments, second_moments, betas, eps, weight_decay, max_norm)
    if len(params):
        _steps.setdefault(params[0].device, BertAdamStep())([group], [lr], backend=backend)


def _check(groups: Sequence[BertAdamGroup], lrs: Sequence[float] | Tensor) -> None:
    if isinstance(lrs, Tensor) and (lrs.shape != (len(groups),) or lrs.dtype != torch.float32):
        raise FastidcError(f"bert_adam: lrs must be fp32 [{len(groups)}], a rate a group, got {lrs.dtype} {list(lrs.shape)}.")
    if len(lrs) != len(groups):
        raise FastidcError(f"bert_adam: {len(groups)} groups and {len(lrs)} rates; give each group one.")
    if isinstance(lrs, Tensor) and any(p.dtype.itemsize < 4 for group in groups for p in group.params):
        raise FastidcError("bert_adam: parameters in half precision take their rates as numbers; as tensors they would be rounded before.")
    for group in groups:
        sizes = {len(group.params), len(group.grads), len(group.first_moments), len(group.second_moments)}
        if len(sizes | ({len(group.shadows)} if group.shadows is not None else set())) > 1:
            raise FastidcError(
                f"bert_adam: as many gradients and moments as parameters are needed, got {len(group.params)} parameters, {len(group.grads)} "
                f"gradients, {len(group.first_moments)} first and {len(group.second_moments)} second moments."
            )


def _serving(params: Sequence[Tensor], backend: str) -> str:
    """Who serves all of them: where they are of several dtypes that have several backends, torch."""
    device = params[0].device
    dtypes = dict.fromkeys(p.dtype for p in params)
    names = {op.serving(Spec("bert_adam", device.type, dtype, False, arch_of(device)), backend) for dtype in dtypes}
    name = names.pop() if len(names) == 1 else "torch"
    if name == "triton" and list(dtypes) != [torch.float32]:
        wrong = next(dtype for dtype in dtypes if dtype != torch.float32)
        raise FastidcError(f"backend 'triton' cannot serve this bert_adam call: it takes parameters in fp32, not in {wrong}.")
    return name


def _as_parameters(group: BertAdamGroup) -> list[Tensor]:
    """The gradients in their parameters' dtypes."""
    return [g.to(p.dtype) for g, p in zip(group.grads, group.params, strict=True)]


def _shadowed(group: BertAdamGroup) -> list[tuple[Tensor, Tensor]]:
    return [(s, p) for s, p in zip(group.shadows or (), group.params, strict=False) if s is not None]


def _lower(ceiling: tuple[Tensor, float] | None) -> None:
    if ceiling is not None:
        ceiling[0].clamp_(max=ceiling[1])


def _triton(groups: Sequence[BertAdamGroup], lrs, clip_norm: float | None, norm: Tensor | None, ceiling, skipped: Tensor, tables) -> Tensor:
    params = [p for group in groups for p in group.params]
    rates = lrs if isinstance(lrs, Tensor) else triton_backend.rates_on(params[0].device, lrs)
    own = ceiling if ceiling is not None and any(p is ceiling[0] for p in params) else None
    norm = tables.step(groups, rates, clip_norm, norm, own, skipped)
    if own is None:  # it does not train, or there is none
        _lower(ceiling)
    return norm


# Adam's bias corrections are 1 - beta^step: after so many steps both are 1 to the last bit, which is what BertAdam computes at every step.
_UNCORRECTED = 1e9


def _torch(groups: Sequence[BertAdamGroup], lrs, clip_norm: float | None, norm: Tensor | None, ceiling, skipped: Tensor, tables) -> Tensor:
    """foreach clips and torch's fused AdamW, whose decay p (1 - lr wd) - lr u is BertAdam's p - lr (u + wd p): one pass over the memory."""
    grads = [g for group in groups for g in group.grads]
    if norm is None:
        norm = torch.nn.utils.get_total_norm(grads)
        if clip_norm is not None:
            factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for dtype in dict.fromkeys(g.dtype for g in grads):
                torch._foreach_mul_([g for g in grads if g.dtype == dtype], factor)
    bad = (norm - norm).nan_to_num_(nan=1.0)  # 0 where it is finite, else 1, which has torch's update do nothing
    skipped += bad
    step = torch.full((), _UNCORRECTED, device=norm.device)
    for group, lr in zip(groups, lrs, strict=True):
        for dtype in dict.fromkeys(p.dtype for p in group.params):
            parts = (group.params, group.grads, group.first_moments, group.second_moments)
            tensors = [[t for t, p in zip(part, group.params, strict=True) if p.dtype == dtype] for part in parts]
            _torch_group(*tensors, lr, group.betas, group.eps, group.weight_decay, group.max_norm, step, bad)
    if pairs := [pair for group in groups for pair in _shadowed(group)]:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    _lower(ceiling)
    return norm


def _torch_group(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay, max_norm, step, bad) -> None:
    if max_norm is not None:
        scales = torch._foreach_norm(grads)
        torch._foreach_add_(scales, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, max_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(grads, scales)
    if params[0].dtype.itemsize < 4:
        if bad.device.type != "cpu" or not bad:
            _foreach_half(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay)
        return
    torch._fused_adamw_(
        params,
        grads,
        first_moments,
        second_moments,
        [],
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=bad,
    )


def _foreach_half(params, grads, first_moments, second_moments, lr, betas, eps, weight_decay) -> None:
    """The official sequence of operations, each result rounded to fp16, factors not. Like the official code it asks nobody whether a gradient is
    finite; on a CPU, where asking is free, its caller does.

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


def _reference(
    groups: Sequence[BertAdamGroup], lrs, clip_norm: float | None, norm: Tensor | None, ceiling, skipped: Tensor, tables
) -> Tensor:
    if norm is None:
        norm = reference.clip_grad_norm([g for group in groups for g in group.grads], math.inf if clip_norm is None else clip_norm)
    finite = bool(norm.isfinite())
    skipped += not finite
    for group, lr in zip(groups, lrs, strict=True) if finite else ():
        for param, grad, m, v in zip(group.params, group.grads, group.first_moments, group.second_moments, strict=True):
            reference.bert_adam_step(param, grad, m, v, float(lr), group.betas, group.eps, group.weight_decay, group.max_norm)
        for shadow, param in _shadowed(group):
            shadow.copy_(param)
    _lower(ceiling)
    return norm


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: there the kernels read gradients twice and the rest once, where torch's clip also writes them; what they take is
    fp32."""
    return ("triton", "torch") if spec.device == "cuda" and spec.dtype == torch.float32 else ("torch",)


op = Op(
    "bert_adam",
    [Backend("triton", _triton, triton_backend.unsupported), Backend("torch", _torch), Backend("reference", _reference)],
    order=_order,
)
