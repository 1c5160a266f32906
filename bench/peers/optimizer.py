"""AdamW as its users run it. It is another algorithm than BertAdam (bias correction, no clipping by tensor), so it brings its own truth."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Inputs, Variant

BETAS, EPS, DECAY = (0.9, 0.98), 1e-6, 0.2
STEPS_BEHIND = 9  # taken before, so that bias correction is at work


def variants(exact: Callable, clipped: Callable) -> list[Variant]:
    def fused(case: Case) -> list[str]:
        return [] if case.device in ("cuda", "cpu") else ["it is fused on CUDA and CPU only."]

    return [
        Variant("AdamW foreach", lambda case: _step, adapt=_with({"foreach": True}), exact=exact),
        Variant("AdamW fused", lambda case: _step, fused, adapt=_with({"fused": True}), exact=exact),
        Variant("clip_grad_norm_ + AdamW fused", lambda case: _clipped, fused, adapt=_with({"fused": True}), exact=clipped),
    ]


def _with(options: dict):
    """Parameters with gradients and an optimiser that holds their moments: what a training loop has before its step."""

    def adapt(case: Case, inputs: Inputs, upstream: list[Tensor]) -> tuple[Inputs, list[Tensor]]:
        params = [torch.nn.Parameter(p) for p in inputs["params"]]
        optimizer = torch.optim.AdamW(params, lr=inputs["lr"], betas=BETAS, eps=EPS, weight_decay=DECAY, **options)
        moments = zip(params, inputs["grads"], inputs["first_moments"], inputs["second_moments"], strict=True)
        for p, grad, first, second in moments:
            p.grad = grad
            step = torch.tensor(float(STEPS_BEHIND), device=p.device if "fused" in options else "cpu")
            optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return {"optimizer": optimizer}, upstream

    return adapt


def _step(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    optimizer.step()
    return [p.detach() for p in optimizer.param_groups[0]["params"]]


def _clipped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    return _step(optimizer)
