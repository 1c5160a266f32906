"""A whole training step, forward, backward and optimiser, host included: fastidc against the official code (A) and an idiomatic port (B).

All start from the same weights and see the same batch, on the device already; dropout is the recipe's. The gate runs without dropout: loss
and gradients of one batch against the float64 reference.
"""

import functools

import torch

from bench import roofline
from bench.case import Case, Variant, Verdict
from bench.cases import Scale, of
from bench.families import steps
from bench.gate import relative
from fastidc.config import ModelConfig

ABOUT = "whole training steps; pairs/s on CUDA, ratios on a CPU"
BASELINES = ("A official", "B idiomatic")
SETTINGS = {
    "paper": {"seconds": 15.0, "least": 5, "most": 10, "warm_up": 2},
    "cpu": {"seconds": 60.0, "least": 5, "most": 5, "warm_up": 1},
    "smoke": {"seconds": 1.0, "least": 3, "most": 3, "warm_up": 1},
}
LIMITS = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 0.2)}  # of loss and of gradients
HALF_WEIGHTS = (2e-2, 0.5)  # A's on CUDA: gradients in fp16 without a loss scale, as published


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*shape, scale, device, dtype) for shape in of("train_step", scale)]


def _case(name: str, config: ModelConfig, stage: str, samples: int, scale: Scale, device: str, dtype: torch.dtype) -> Case:
    pairs = 1 if stage == "adapt" else 2
    floor = roofline.adaptation(config) if stage == "adapt" else roofline.captioning(config, pairs=pairs, stem=True)
    # 124 M to 146 M trained parameters of B/32: everything but the token and patch tables, see performance.md 1.1
    parameters = sum(t.numel() for t in steps_parameters(config, stage))
    whole = roofline.join([floor.times(samples), roofline.optimizer(parameters)])
    return Case(
        family="train_step",
        name=f"{name} {stage} B={samples}",
        shape={"config": config, "stage": stage, "samples": samples},
        device=device,
        dtype=dtype,
        make_inputs=lambda device, dtype, seed: {},
        mode="step",
        check=check,
        wall=True,
        calls=10 if scale == "paper" else 1,
        items=("pairs", samples * pairs),
        floor=whole,
    )


@functools.cache
def steps_parameters(config: ModelConfig, stage: str) -> list[torch.Tensor]:
    """The parameters that ``stage`` trains, on the meta device."""
    from fastidc.config import PRESETS
    from fastidc.model.clip4idc import CLIP4IDC
    from fastidc.train.optim import parameter_groups

    with torch.device("meta"):
        model = CLIP4IDC(config.replace(captioner_layers=0) if stage == "adapt" else config)
    return [p for group in parameter_groups(model, stage, getattr(PRESETS["clevr"], stage)) for p in group["params"]]


def variants(case: Case) -> list[Variant]:
    return steps.variants(_step)


def _step(case: Case, name: str):
    config, stage = case.shape["config"], case.shape["stage"]
    stepper = steps.build(case, name, config, stage)
    batch = stepper.prepare(steps.batch_of(config, stage, case.shape["samples"]))
    return lambda: stepper.step(batch)


def check(case: Case, variant: Variant, function) -> Verdict:
    config, stage = case.shape["config"], case.shape["stage"]
    stepper = steps.build(case, variant.name, config.replace(dropout=0.0), stage)
    batch = stepper.prepare(steps.batch_of(config, stage, steps.GATE_SAMPLES))
    loss, gradients = steps.exact_step(config, stage, case.device)
    of_loss, of_gradients = LIMITS[case.dtype]
    if variant.name == "A official" and case.dtype != torch.float32:
        of_loss, of_gradients = HALF_WEIGHTS
    first = Verdict(relative(stepper.forward_backward(batch), loss), of_loss, "loss")
    second = Verdict(steps.gradient_error(stepper.model, gradients), of_gradients, "gradients")
    return first if not first.passed or (second.passed and first.error / of_loss > second.error / of_gradients) else second
