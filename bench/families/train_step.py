"""A whole training step, forward, backward and optimiser, host included: fastidc against the official code (A) and an idiomatic port (B).

All start from the same weights and see the same batch, on the device already; dropout is the recipe's. The gate runs without dropout: loss
and gradients of one batch against the float64 reference.
"""

import functools
from collections.abc import Callable

import torch

from bench import probe, roofline, timing, waterfall
from bench.case import Case, Variant, Verdict
from bench.cases import Scale, StepShape, of
from bench.families import steps
from bench.gate import relative
from fastidc.config import ModelConfig

CALLS, MANY = 5, 128  # calls in a lap; from so many pairs on one, because the device's work hides the host's
CHUNK = {"paper": 64, "smoke": 2}  # samples, in multiples of which the largest batch that fits is sought
MOST = {"paper": 256, "smoke": 2}  # chunks: where the search ends if memory does not

ABOUT = "whole training steps; pairs/s on CUDA, ratios on a CPU"
BASELINES = ("A official", "B idiomatic")
SETTINGS = {
    "paper": {"seconds": 6.0, "least": 5, "most": 10, "warm_up": 2},
    "cpu": {"seconds": 60.0, "least": 5, "most": 5, "warm_up": 1},
    "smoke": {"seconds": 1.0, "least": 3, "most": 3, "warm_up": 1},
}
LIMITS = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 0.2)}  # of loss and of gradients
HALF_WEIGHTS = (2e-2, 0.1)  # A's on CUDA: gradients in fp16 without a loss scale, as published


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(shape, scale, device, dtype) for shape in of("train_step", scale)]


def _case(shape: StepShape, scale: Scale, device: str, dtype: torch.dtype) -> Case:
    config, stage, samples = shape.config, shape.stage, shape.samples
    pairs = 1 if stage == "adapt" else 2
    floor = roofline.adaptation(config) if stage == "adapt" else roofline.captioning(config, pairs=pairs, stem=True)
    # 124 M to 146 M trained parameters of B/32: everything but the token and patch tables, see performance.md 1.1
    parameters = sum(t.numel() for t in steps_parameters(config, stage))
    facts = {"config": config, "stage": stage, "samples": samples, "scale": scale, "waterfall": shape.waterfall}
    return Case(
        family="train_step",
        name=f"{shape.name} {stage} B={samples or 'max'}",
        shape=facts,
        device=device,
        dtype=dtype,
        make_inputs=lambda device, dtype, seed: {},
        mode="step",
        check=check,
        wall=True,
        calls=CALLS if scale == "paper" and samples is not None and samples * pairs <= MANY else 1,
        items=("pairs", (samples or 1) * pairs),
        floor=None if samples is None else roofline.join([floor.times(samples), roofline.optimizer(parameters)]),
        alone=samples is None or parameters > 250e6,  # with L/14's 430 M parameters each, all variants and a step's activations do not fit
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
    rungs = waterfall.rungs(case.shape["stage"], case.dtype == torch.bfloat16, case.device) if case.shape["waterfall"] else ()
    found = steps.variants(_step, tuple(rungs))
    # each size would be compiled anew on the way to the largest; our captioner is left as it is there
    return found if case.shape["samples"] is not None else [variant for variant in found if not variant.compiled]


def _step(case: Case, name: str) -> Callable:
    config, stage, samples = case.shape["config"], case.shape["stage"], case.shape["samples"]
    more = {} if samples is not None or name in BASELINES else {"compiling": "off", "graph": "off"}  # see `variants`
    stepper = steps.build(name, config, stage, case.device, case.dtype, **more)
    if samples is not None:
        return functools.partial(stepper.step, stepper.prepare(steps.batch_of(config, stage, samples)))
    chunk = CHUNK[case.shape["scale"]]
    batch = steps.batch_of(config, stage, chunk)

    def one(chunks: int) -> None:
        timing.release(case.device)  # what the step before it had, whose blocks are of other sizes
        try:
            stepper.step(stepper.prepare(steps.repeated(batch, chunks)))
            if case.device == "cuda":
                torch.cuda.synchronize()
        finally:  # a step that ran out of memory has left some of its gradients
            stepper.model.zero_grad(set_to_none=True)

    chunks = probe.largest(one, MOST[case.shape["scale"]])
    if not chunks:
        raise torch.OutOfMemoryError(f"not even {chunk} samples fit")
    timing.release(case.device)
    step = functools.partial(stepper.step, stepper.prepare(steps.repeated(batch, chunks)))
    step.batch = chunk * chunks
    return step


def check(case: Case, variant: Variant, function) -> Verdict:
    return _verdict(variant.name, case.shape["config"], case.shape["stage"], case.device, case.dtype)


@functools.cache  # once for all batch sizes
def _verdict(name: str, config: ModelConfig, stage: str, device: str, dtype: torch.dtype) -> Verdict:
    config, without = steps.gated(name, config), steps.rung(name, stage, dtype, device)
    stepper = steps.build(name, config, stage, device, dtype)
    batch = stepper.prepare(steps.batch_of(config, stage, steps.GATE_SAMPLES))
    loss, gradients = steps.exact_step(config, stage, device, without.get("shared", True))
    of_loss, of_gradients = LIMITS[torch.float32 if without.get("precision") == "fp32" else dtype]
    if name == "A official" and dtype != torch.float32:
        of_loss, of_gradients = HALF_WEIGHTS
    first = Verdict(relative(stepper.forward_backward(batch), loss), of_loss, "loss")
    second = Verdict(steps.gradient_error(stepper.model, gradients), of_gradients, "gradients")
    return first if not first.passed or (second.passed and first.error / of_loss > second.error / of_gradients) else second
