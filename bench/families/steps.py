"""What train_step and generate share: batches, weights, the steppers as variants, and their gate against the float64 reference."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, MissingError, Variant
from bench.cases import CAPTION
from bench.gate import relative
from fastidc.config import CLIP_MEAN, CLIP_STD, ModelConfig
from fastidc.data.loaders import PairBatch

GATE_SAMPLES = 2
# name -> module, the options of its `build` for fp32 and for bf16, whether it runs through torch.compile
STEPPERS: dict[str, tuple[str, dict, dict, bool]] = {
    "fastidc": ("ours", {"precision": "fp32"}, {"precision": "bf16"}, False),
    "A official": ("official_style", {"towers": torch.float32}, {}, False),
    "B idiomatic": ("idiomatic", {"precision": "fp32"}, {"precision": "bf16"}, False),
    "B idiomatic compiled": ("idiomatic", {"precision": "fp32"}, {"precision": "bf16"}, True),
}


def batch_of(config: ModelConfig, stage: str, samples: int, seed: int = 0) -> PairBatch:
    """Noise and captions of `CAPTION` tokens, padded to the longest, as `PairLoader` gives them; on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    pairs = 1 if stage == "adapt" else 2
    low, high = (min(limit, config.context_length) for limit in CAPTION)
    lengths = torch.randint(low, high + 1, (samples * pairs,), generator=draw)
    rows = torch.randint(1, config.vocab_size - 2, (samples * pairs, high), generator=draw)
    place = torch.arange(high)
    ids = torch.where(place < lengths[:, None], rows, 0)  # start, words, end, pads
    ids[:, 0] = config.start_id
    ids[torch.arange(len(ids)), lengths - 1] = config.end_id
    ids = ids[:, : int(lengths.max())]
    shape = (samples, 1 + pairs, config.image_size, config.image_size, 3)
    images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    names = [str(i) for i in range(samples)]
    if stage == "adapt":
        return PairBatch(images, names, text_ids=ids)
    inputs = torch.where(ids == config.end_id, 0, ids)[:, :-1]
    return PairBatch(images, names, input_ids=inputs.view(samples, pairs, 1, -1), target_ids=ids[:, 1:].reshape(samples, pairs, 1, -1))


@functools.lru_cache(maxsize=1)
def weights(config: ModelConfig) -> dict[str, Tensor]:
    """A model's random initialisation under official names, fp32, on the CPU."""
    from fastidc import checkpoint
    from fastidc.model.clip4idc import CLIP4IDC

    torch.manual_seed(0)
    model = CLIP4IDC(config)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return checkpoint.to_official(own, checkpoint.official_keys(config))


def build(case: Case, name: str, config: ModelConfig, stage: str, **more: Any):
    """The stepper of `STEPPERS` called ``name``, with `weights`."""
    module, single, half, compiled = STEPPERS[name]
    try:
        found = importlib.import_module(f"bench.peers.{module}")
    except ModuleNotFoundError as error:
        raise MissingError(f"{error.name} cannot be imported.") from None
    options = dict(single if case.dtype == torch.float32 else half) | more
    if options.pop("stop_early", None) is not None and module == "ours":
        options["stop_early"] = False
    return found.build(config, weights(case.shape["config"]), stage, torch.device(case.device), compiled, **options)


def variants(make: Callable[[Case, str], Callable]) -> list[Variant]:
    def refuse(case: Case) -> list[str]:
        return [] if case.dtype in (torch.float32, torch.bfloat16) else ["whole steps are measured in bf16 and fp32 only."]

    return [
        Variant(name, lambda case, name=name: make(case, name), refuse, ours=name == "fastidc", compiled=facts[3])
        for name, facts in STEPPERS.items()
    ]


# ---- the float64 reference


def exact_weights(config: ModelConfig, device: str, gradients: bool) -> dict[str, Tensor]:
    """`weights` in float64; a table that stands under several names is one leaf."""
    leaves: dict[int, Tensor] = {}
    out = {}
    for name, tensor in weights(config).items():
        if tensor.data_ptr() not in leaves or leaves[tensor.data_ptr()].shape != tensor.shape:
            leaves[tensor.data_ptr()] = tensor.to(device, torch.float64).clone().requires_grad_(gradients)
        out[name] = leaves[tensor.data_ptr()]
    return out


def normalised(images: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float64 [..., 3, H, W]"""
    mean, std = (torch.tensor(x, dtype=torch.float64, device=images.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (images.movedim(-1, -3) / 255.0 - mean) / std


@functools.lru_cache(maxsize=1)
def exact_step(config: ModelConfig, stage: str, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the gate's batch without dropout, and its gradients under our names."""
    from fastidc import checkpoint
    from fastidc.reference import clip4idc as reference

    batch = batch_of(config, stage, GATE_SAMPLES).to(torch.device(device))
    w = exact_weights(config, device, True)
    images = normalised(batch.images)
    if stage == "adapt":
        loss = reference.adaptation_loss(w, images, batch.text_ids, config.intra_layers)
    else:
        loss = sum(
            reference.caption_loss(
                w,
                images[:, [0, i + 1]],
                batch.input_ids[:, i, 0],
                (batch.target_ids[:, i, 0] != 0).long(),
                batch.target_ids[:, i, 0],
                config.intra_layers,
            )
            for i in range(2)
        )
    loss.backward()
    grads = {name: tensor.grad for name, tensor in w.items() if tensor.grad is not None}
    return loss.detach(), checkpoint.from_official(grads)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients that a stepper left, under our names."""
    from fastidc import checkpoint

    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return checkpoint.from_official(found) if any(name.startswith("clip.") for name in found) else found


def gradient_error(model: torch.nn.Module, truth: dict[str, Tensor]) -> float:
    """Relative norm over all parameters that train."""
    found = gradients_of(model)
    names = [name for name in found if name in truth]
    if len(names) < len(found) or not names:
        return float("nan")
    actual, expected = (torch.cat([grads[name].double().flatten() for name in names]) for grads in (found, truth))
    return relative(actual, expected)
