"""What train_step and generate share: batches, weights, the steppers as variants, and their gate against the float64 reference."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import waterfall
from bench.case import Case, MissingError, Variant
from bench.cases import CAPTION
from fastidc.config import CLIP_MEAN, CLIP_STD, ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.packed import PackedText

GATE_SAMPLES = 2
# name -> module, the options of its `build` for fp32 and for bf16, whether it runs through torch.compile
STEPPERS: dict[str, tuple[str, dict, dict, bool]] = {
    "fastidc": ("ours", {"precision": "fp32"}, {"precision": "bf16"}, False),
    "A official": ("official_style", {"towers": torch.float32}, {}, False),
    "B idiomatic": ("idiomatic", {"precision": "fp32"}, {"precision": "bf16"}, False),
    "B idiomatic compiled": ("idiomatic", {"precision": "fp32"}, {"precision": "bf16"}, True),
}


@functools.lru_cache(maxsize=2)
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
        return PairBatch(images, names, text=PackedText.from_padded(ids))
    inputs = torch.where(ids == config.end_id, 0, ids)[:, :-1]
    return PairBatch(images, names, input_ids=inputs.view(samples, pairs, 1, -1), target_ids=ids[:, 1:].reshape(samples, pairs, 1, -1))


def repeated(value: Any, times: int) -> Any:
    """A prepared batch with its samples over and over, on its device."""
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.dim() - 1))
    if isinstance(value, tuple):
        return tuple(repeated(item, times) for item in value)
    if isinstance(value, PackedText):
        return PackedText.from_padded(value.padded().repeat(times, 1)).to(value.ids.device)
    if dataclasses.is_dataclass(value):
        fields = {field.name: repeated(getattr(value, field.name), times) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@functools.lru_cache(maxsize=2)  # a model and its shallow copy
def weights(config: ModelConfig, device: str) -> dict[str, Tensor]:
    """A model's random initialisation under official names, fp32."""
    from fastidc import checkpoint
    from fastidc.model.clip4idc import CLIP4IDC

    torch.manual_seed(0)
    model = CLIP4IDC(config)
    own = {name: parameter.detach().to(device) for name, parameter in model.named_parameters()}
    return checkpoint.to_official(own, checkpoint.official_keys(config))


def rung(name: str, stage: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What fastidc is built without, where ``name`` is a rung of the waterfall."""
    return waterfall.rungs(stage, dtype == torch.bfloat16, device).get(name, {})


def build(name: str, config: ModelConfig, stage: str, device: str, dtype: torch.dtype, **more: Any):
    """The stepper called ``name``, of `STEPPERS` or a rung of the waterfall, with `weights`."""
    module, single, half, compiled = STEPPERS.get(name, STEPPERS[waterfall.OURS])
    try:
        found = importlib.import_module(f"bench.peers.{module}")
    except ModuleNotFoundError as error:
        raise MissingError(f"{error.name} cannot be imported.") from None
    options = dict(single if dtype == torch.float32 else half) | rung(name, stage, dtype, torch.device(device).type) | more
    if options.pop("stop_early", None) is not None and module == "ours":
        options["stop_early"] = False
    return found.build(config, weights(config.replace(dropout=0.0), device), stage, torch.device(device), compiled, **options)


def variants(make: Callable[[Case, str], Callable], rungs: tuple[str, ...] = ()) -> list[Variant]:
    def refuse(case: Case) -> list[str]:
        return [] if case.dtype in (torch.float32, torch.bfloat16) else ["whole steps are measured in bf16 and fp32 only."]

    def variant(name: str, ours: bool, compiled: bool) -> Variant:
        return Variant(name, lambda case: make(case, name), refuse, ours=ours, compiled=compiled)

    known = [variant(name, name == waterfall.OURS, compiled) for name, (_, _, _, compiled) in STEPPERS.items()]
    return known + [variant(name, True, False) for name in rungs]


def gated(name: str, config: ModelConfig) -> ModelConfig:
    """What the gate builds of ``config``: no dropout, and for a compiled peer one layer of each kind, because compiling takes its time for
    every layer and every shape, and the same modules are judged at their full depth uncompiled."""
    config = config.replace(dropout=0.0)
    if not STEPPERS.get(name, STEPPERS[waterfall.OURS])[3]:
        return config
    return config.replace(vision_layers=2, intra_layers=1, text_layers=1, captioner_layers=min(1, config.captioner_layers))


# ---- the float64 reference


def exact_weights(config: ModelConfig, device: str, gradients: bool) -> dict[str, Tensor]:
    """`weights` in float64; a table that stands under several names is one leaf."""
    leaves: dict[int, Tensor] = {}
    out = {}
    for name, tensor in weights(config, device).items():
        if tensor.data_ptr() not in leaves or leaves[tensor.data_ptr()].shape != tensor.shape:
            leaves[tensor.data_ptr()] = tensor.double().requires_grad_(gradients)
        out[name] = leaves[tensor.data_ptr()]
    return out


def normalised(images: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float64 [..., 3, H, W]"""
    mean, std = (torch.tensor(x, dtype=torch.float64, device=images.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (images.movedim(-1, -3) / 255.0 - mean) / std


@functools.lru_cache(maxsize=2)
def exact_step(config: ModelConfig, stage: str, device: str, shared: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the gate's batch without dropout, and its gradients under our names, on the CPU: with many layers they would fill a device.

    ``shared=False``: of the same pairs, each by itself, as `bench.peers.ours.independent` lays them out."""
    from bench.peers.ours import independent
    from fastidc import checkpoint
    from fastidc.reference import clip4idc as reference

    batch = batch_of(config, stage, GATE_SAMPLES).to(torch.device(device))
    batch = batch if shared else independent(batch)
    w = exact_weights(config, device, True)
    images = normalised(batch.images)
    if stage == "adapt":
        loss = reference.adaptation_loss(w, images, batch.text.padded(), config.intra_layers)
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
            for i in range(images.shape[1] - 1)
        )
    loss.backward()
    grads = {name: tensor.grad.cpu() for name, tensor in w.items() if tensor.grad is not None}
    return loss.detach(), checkpoint.from_official(grads)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients that a stepper left, under our names."""
    from fastidc import checkpoint

    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return checkpoint.from_official(found) if any(name.startswith("clip.") for name in found) else found


def gradient_error(model: torch.nn.Module, truth: dict[str, Tensor]) -> float:
    """Relative norm over all parameters that train; tensor by tensor, because all of them in float64 need not fit."""
    found = gradients_of(model)
    if not found or not found.keys() <= truth.keys():
        return float("nan")
    off = size = 0.0
    for name, grad in found.items():
        expected = truth[name].to(grad.device)
        off += float((grad.double() - expected).square().sum())
        size += float(expected.square().sum())
    return (off / size) ** 0.5
