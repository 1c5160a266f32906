"""One optimiser step over every parameter that a stage trains, fp32, its launches included."""

import functools

import torch

from bench import exact, roofline
from bench.case import Case, Inputs, Variant
from bench.cases import Scale, of
from bench.families.train_step import steps_parameters
from bench.ours import variants_of
from bench.peers import optimizer as peers
from fastidc.config import ModelConfig
from fastidc.reference import bert_adam as reference

ABOUT = "one optimiser step; % of floor counts 28 bytes a parameter, and a norm before it needs 4 more"
BASELINES = ("AdamW foreach",)
DTYPES = (torch.float32,)
LR = 1e-2  # large, so that the gate sees the update beside the parameter


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*shape, scale, device) for shape in of("optimizer", scale)]


@functools.cache
def shapes_of(config: ModelConfig, stage: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.shape) for p in steps_parameters(config, stage))


def _case(name: str, config: ModelConfig, stage: str, scale: Scale, device: str) -> Case:
    shapes = shapes_of(config, stage)
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator(device=device).manual_seed(seed)

        def noise(factor: float) -> list[torch.Tensor]:
            return [factor * torch.randn(shape, generator=draw, device=device, dtype=dtype) for shape in shapes]

        second = [t.abs_() for t in noise(1e-4)]
        return {"params": noise(0.02), "grads": noise(1e-2), "first_moments": noise(1e-3), "second_moments": second, "lr": LR}

    return Case(
        family="optimizer",
        name=f"{name} {len(shapes)} tensors {count / 1e6:.1f} M",
        shape={"tensors": len(shapes), "parameters": count},
        device=device,
        dtype=torch.float32,
        make_inputs=inputs,
        exact=bert_adam,
        plain=bert_adam,
        mode="step",
        floor=roofline.optimizer(count),
        wall=True,
        calls=10 if scale == "paper" else 1,
        items=("parameters", count),
    )


def bert_adam(params, grads, first_moments, second_moments, lr) -> list[torch.Tensor]:
    """The reference in the official recipe's constants: one clip of all gradients, then tensor by tensor, in place; returns parameters and
    moments."""
    grads = [g.clone() for g in grads]
    reference.clip_grad_norm(grads, 1.0)
    for p, g, m, v in zip(params, grads, first_moments, second_moments, strict=True):
        reference.bert_adam_step(p, g, m, v, lr, peers.BETAS, peers.EPS, peers.DECAY, None)
    return [*params, *first_moments, *second_moments]


def variants(case: Case) -> list[Variant]:
    return [*variants_of("bert_adam", _ours), *peers.variants(exact.adamw, exact.clipped_adamw)]


def _ours(case: Case, backend: str):
    """As `fastidc.train.optim.Optimizer` steps."""
    from fastidc import ops

    step = ops.BertAdamStep()

    def run(params, grads, first_moments, second_moments, lr):
        group = ops.BertAdamGroup(params, grads, first_moments, second_moments, peers.BETAS, peers.EPS, peers.DECAY)
        step([group], [lr], clip_norm=1.0, backend=backend)
        return [*params, *first_moments, *second_moments]

    return run
