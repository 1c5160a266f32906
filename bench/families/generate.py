"""Greedy captions of a batch of pairs, 32 steps for everyone, from pixels to ids: fastidc against A and B; and from the pairs' tokens to
ids, the loop by itself.

The gate asks the float64 reference about every word that a variant chose, given its own words before: how far below the best one does it
lie, in standard deviations of the logits over the vocabulary? So rounding may choose between equals, and one such choice spoils nothing.
"""

import dataclasses
import functools

import torch

from bench import roofline
from bench.case import Case, Variant, Verdict
from bench.cases import STEPS, GenerateShape, Scale, of
from bench.families import steps
from fastidc.config import ModelConfig

ABOUT = "greedy decoding; pairs/s on CUDA, ratios on a CPU"
COMPILED = "fastidc compiled"
BASELINES = ("A official", "B idiomatic")
SETTINGS = {
    "paper": {"seconds": 6.0, "least": 5, "most": 20, "warm_up": 2},
    "cpu": {"seconds": 60.0, "least": 5, "most": 5, "warm_up": 1},
    "smoke": {"seconds": 1.0, "least": 3, "most": 3, "warm_up": 1},
}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(shape, scale, device, dtype) for shape in of("generate", scale)]


def _case(shape: GenerateShape, scale: Scale, device: str, dtype: torch.dtype) -> Case:
    name, config, pairs, towers = shape
    return Case(
        family="generate",
        name=f"{name} b={pairs} {STEPS[scale]} steps",
        shape={"config": config, "pairs": pairs, "steps": STEPS[scale], "towers": towers},
        device=device,
        dtype=dtype,
        make_inputs=lambda device, dtype, seed: {},
        check=check,
        wall=True,
        items=("pairs", pairs),
        floor=roofline.generation(config, pairs, STEPS[scale]) if towers else None,
    )


def variants(case: Case) -> list[Variant]:
    # fastidc's step through torch.compile, which is not its default: it takes tens of seconds before the first caption
    refuse = steps.variants(_generate)[0].unsupported
    return [*steps.variants(_generate), Variant(COMPILED, lambda case: _generate(case, COMPILED), refuse, ours=True, compiled=True)]


def _generate(case: Case, name: str):
    return _decoder(name, case.shape["config"], case.shape["pairs"], case.shape["steps"], case.device, case.dtype, case.shape["towers"])


def _decoder(name: str, config: ModelConfig, pairs: int, words: int, device: str, dtype: torch.dtype, towers: bool = True):
    stepper = steps.build(name, config, "finetune", device, dtype, stop_early=False)
    if name == COMPILED:
        stepper.model.generate_from_tokens = functools.partial(stepper.model.generate_from_tokens, compiled=True)
    if not towers:
        _answer_once(stepper.model)
    return functools.partial(stepper.generate, stepper.prepare(_pairs_only(config, pairs)), words)


def _answer_once(model: torch.nn.Module) -> None:
    """The model's towers run at the first call; later ones get its answer."""
    owner, name = next(
        (m, n) for m, n in ((model, "encode_batch"), (model, "encode"), (getattr(model, "pair_encoder", None), "forward")) if hasattr(m, n)
    )
    towers, answer = getattr(owner, name), []

    def once(*args, **kwargs):
        if not answer:
            answer.append(towers(*args, **kwargs))
        return answer[0]

    setattr(owner, name, once)


def _pairs_only(config: ModelConfig, pairs: int):
    batch = steps.batch_of(config, "adapt", pairs)
    return dataclasses.replace(batch, text=None)


def check(case: Case, variant: Variant, function) -> Verdict:
    return _verdict(variant.name, case.shape["config"], case.shape["steps"], case.device, case.dtype)


@functools.cache  # once for all batch sizes
def _verdict(name: str, config: ModelConfig, words: int, device: str, dtype: torch.dtype) -> Verdict:
    from fastidc.reference import clip4idc as reference

    config = steps.gated(name, config)
    ids = _decoder(name, config, steps.GATE_SAMPLES, words, device, dtype)().flatten(0, 1)
    w = steps.exact_weights(config, device, False)
    images = steps.normalised(_pairs_only(config, steps.GATE_SAMPLES).images.to(device))
    start = torch.full_like(ids[:, :1], config.start_id)
    given = torch.cat([start, ids[:, :-1]], dim=1)
    with torch.no_grad():
        memory = reference.caption_memory(w, reference.encode_pair(w, images, config.intra_layers)[1])
        logits = reference.caption_logits(w, memory, given, torch.ones_like(given))  # [B, T, V]
    regret = (logits.amax(-1) - logits.gather(-1, ids[..., None])[..., 0]) / logits.std(-1)
    ended = (ids == config.end_id).cumsum(1)
    counts = (ended - (ids == config.end_id).long()) == 0  # what follows the end token has no meaning
    return Verdict(float((regret * counts).max()), LIMITS[dtype], "a chosen word")
