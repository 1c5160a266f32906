"""Any source that `CLIP4IDC.from_pretrained` accepts -> `Read`: a config and weights under our names."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastidc.checkpoint import hub, names
from fastidc.checkpoint.load import load_file, open_clip_state
from fastidc.config import ModelConfig
from fastidc.errors import FastidcError
from fastidc.files import parse_json, read_plain

FORMAT = "fastidc"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
Layout = Literal["fastidc", "official", "openai"]


_SPARE = 100_000_000  # numbers that a model may have beyond its file's: parts that are drawn at random


@dataclass(frozen=True)
class Read:
    """What a source held: the model's config, its weights under our names, and which of the config's parts it lacks."""

    config: ModelConfig
    weights: dict[str, Tensor]
    source: str
    fresh: tuple[str, ...] = ()
    layout: Layout = "fastidc"
    foreign: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Our name -> the source's own key for it, for sentences, and how many of its tensors ours packs; empty for a fastidc folder."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """OpenAI's tensors that are no parameters, where the source has them."""
    unknown: tuple[str, ...] = ()
    """Keys of a foreign file that no parameter of ours stands for."""
    facts: Mapping = field(default_factory=dict)
    """What else a fastidc folder's config.json says: preset, recipe, run."""
    folder: Path | None = None
    """Where a fastidc folder lies; of one on the Hugging Face Hub its copy here."""


def read(
    source: str | os.PathLike,
    *,
    intra_layers: int | None = None,
    captioner_layers: int | None = None,
    pair_input: str | None = None,
    keep_dtype: bool = False,
) -> Read:
    """Reads any source that `CLIP4IDC.from_pretrained` accepts; FastidcError names what does not fit. Weights are fp32, or with
    ``keep_dtype`` what the source has (official files: `names.is_half_officially`)."""
    source = os.fspath(source)
    asked = {"intra_layers": intra_layers, "captioner_layers": captioner_layers, "pair_input": pair_input}
    path = Path(source)
    if source.startswith("open_clip:"):
        found = _read_foreign(open_clip_state(source), source, **asked)
    elif source.startswith(hub.PREFIX):
        found = _read_folder(hub.fetch(source), **asked)
    elif path.is_dir():
        found = _read_folder(path, **asked)
    elif path.is_file():
        found = _read_foreign(load_file(path), source, **asked)
    else:
        raise FastidcError(f"{source}: no such checkpoint; give a fastidc folder, a checkpoint file, open_clip:NAME/TAG or hub:OWNER/NAME.")
    _check_claim(found)
    if keep_dtype:
        return found
    return dataclasses.replace(found, weights={name: tensor.float() for name, tensor in found.weights.items()})


def _check_claim(found: Read) -> None:
    """FastidcError where the config is of a model out of all proportion to the weights: it would be built before anything is compared."""
    config, held = found.config, sum(tensor.numel() for tensor in found.weights.values())
    w, e, p = config.vision_width, config.embed_dim, config.patch_size
    captioner = 0 if "captioner." in found.fresh else 28 * config.captioner_layers * e * e
    tables = config.image_tokens * w + 3 * p * p * w + (config.vocab_size + config.context_length) * e
    claimed = 12 * (config.vision_layers * w * w + config.text_layers * e * e) + captioner + tables
    if claimed > 4 * held + _SPARE:
        raise FastidcError(
            f"{found.source}: holds {held:,} numbers, and its config is of a model of {claimed:,}; the two do not belong together."
        )


def folder_of(source: str | os.PathLike) -> Path | None:
    """The fastidc folder that ``source`` names: itself, or the copy here of one on the Hub; None where it is another kind of source."""
    source = os.fspath(source)
    if source.startswith(hub.PREFIX):
        return hub.fetch(source)
    return Path(source) if (Path(source) / CONFIG_FILE).is_file() else None


def read_config(folder: str | os.PathLike) -> dict:
    """The ``config.json`` of a fastidc folder, checked for being one."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = parse_json(read_plain(path).decode())
    except (OSError, ValueError) as error:
        raise FastidcError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("model"), dict):
        raise FastidcError(f'{path}: not a fastidc config: the fields "format": "fastidc" and "model" are missing.')
    return values


def check_fit(
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Tensor],
    source: str,
    fresh: Sequence[str] = (),
    foreign: Mapping[str, tuple[str, int]] | None = None,
) -> None:
    """FastidcError unless ``weights`` has every name of ``shapes`` with its shape; names under ``fresh`` may be absent. ``foreign`` is
    `Read.foreign`: the sentence then names the file's own key."""
    for name, shape in shapes.items():
        key, parts = (foreign or {}).get(name, (name, 1))
        if name not in weights:
            if name.startswith(tuple(fresh)):
                continue
            missing = sum(n not in weights and not n.startswith(tuple(fresh)) for n in shapes)
            raise FastidcError(f"{source}: tensor {key} is missing ({missing} in all); this file does not hold the whole model.")
        if tuple(weights[name].shape) != tuple(shape):
            has, needs = _of_part(weights[name].shape, parts), _of_part(shape, parts)
            raise FastidcError(f"{source}: tensor {key} has shape {has}, the model needs {needs}.")


def _of_part(shape: Sequence[int], parts: int) -> list[int]:
    """The shape of each of the ``parts`` that a tensor was packed from."""
    return [shape[0] // parts, *shape[1:]] if shape else []


def _read_folder(path: Path, intra_layers: int | None, captioner_layers: int | None, pair_input: str | None) -> Read:
    config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not config_path.is_file():
        raise FastidcError(f"{path}: no {CONFIG_FILE} in this folder; give the folder of a fastidc run, or a checkpoint file.")
    if not weights_path.is_file():
        raise FastidcError(f"{path}: no {WEIGHTS_FILE} in this folder; the run that wrote it has not finished.")
    values = read_config(path)
    shape, fresh, extras = values["model"], _fresh_parts(values, config_path), _extras(values, config_path)
    if missing := sorted({field.name for field in dataclasses.fields(ModelConfig)} - set(shape)):
        raise FastidcError(f"{config_path}: field model.{missing[0]} is missing; the file is damaged or from another version of fastidc.")
    asked = {name: given for name, given in (("intra_layers", intra_layers), ("pair_input", pair_input)) if given is not None}
    config = ModelConfig.from_dict(shape | (asked if fresh else {}), str(config_path))  # a CLIP has no split yet: any may be asked for
    for name, given in asked.items():
        if given != getattr(config, name):
            raise FastidcError(f"{config_path}: the model has {name} {getattr(config, name)}, which is part of it; {given} was asked for.")
    if captioner_layers not in (None, config.captioner_layers):
        if config.captioner_layers:
            raise FastidcError(f"{config_path}: the captioner has {config.captioner_layers} layers; {captioner_layers} were asked for.")
        config, fresh = config.replace(captioner_layers=captioner_layers), (*fresh, "captioner.")
    facts = {key: value for key, value in values.items() if key not in ("format", "version", "model", "fresh", "clip_extras")}
    return Read(config, load_file(weights_path), str(weights_path), fresh, extras=extras, facts=facts, folder=path)


def _fresh_parts(values: dict, path: Path) -> tuple[str, ...]:
    fresh = values.get("fresh", [])
    if not isinstance(fresh, list) or not all(part in names.PAIR_PARAMETERS for part in fresh):
        raise FastidcError(f"{path}: field fresh is {fresh!r}; it lists parts that a CLIP lacks, such as {names.PAIR_PARAMETERS[0]!r}.")
    return tuple(fresh)


def _extras(values: dict, path: Path) -> dict[str, Tensor]:
    try:
        return {key: torch.tensor(e["value"], dtype=getattr(torch, e["dtype"])) for key, e in values.get("clip_extras", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FastidcError(f"{path}: field clip_extras cannot be read ({type(error).__name__}: {error}); convert the CLIP again.") from None


def _read_foreign(
    state: dict[str, Tensor], source: str, intra_layers: int | None, captioner_layers: int | None, pair_input: str | None
) -> Read:
    """A CLIP state dict, or an official CLIP4IDC file of either stage: every hyper-parameter from the shapes (clip4idc.md 1.4)."""
    layout: Layout = "official" if any(key.startswith(names.CLIP_PREFIX) for key in state) else "openai"
    taken_off = names.CLIP_PREFIX if layout == "openai" else ""  # what a sentence must leave away to name the file's own key
    state = {taken_off + key: value for key, value in state.items()}
    if any(key.startswith("clip.visual.layer1.") for key in state):
        raise FastidcError(f"{source}: this is a ResNet CLIP; CLIP4IDC splits a vision transformer, so give a ViT one (ViT-B-32, ...).")
    if (key := "clip.visual.conv2.weight") in state:
        raise FastidcError(
            f"{source}: tensor {key.removeprefix(taken_off)} is that of --linear_patch 3d, which fastidc does not have; give a checkpoint of 2d."
        )
    holders = names.holders(state)
    for keys in holders.values():
        whole = [key for key in keys if key is not None]
        for key in whole[1:]:
            if state[key].shape != state[whole[0]].shape or not state[key].dim():
                has, other = list(state[key].shape), list(state[whole[0]].shape)
                raise FastidcError(f"{source}: tensor {key} has shape {has}, where {whole[0]} has {other}; the two must be alike.")
    weights = names.from_official(state)
    found_in = {name: keys[0] for name, keys in holders.items() if name in weights}
    config = _config_from_shapes(weights, found_in, source, taken_off, intra_layers, pair_input)
    fresh: tuple[str, ...] = () if layout == "official" else names.PAIR_PARAMETERS
    if any(name.startswith("captioner.") for name in weights):
        layers = max(1, _count(weights, "captioner.decoder"))  # a captioner without any layer has lost them
        if captioner_layers not in (None, layers):
            raise FastidcError(f"{source}: the captioner has {layers} layers; {captioner_layers} were asked for.")
    else:
        layers, fresh = captioner_layers or 0, (*fresh, "captioner.")
    config = config.replace(captioner_layers=layers)
    # what is there goes by the key that it was read from, what is not by the first key that would be needed
    foreign = {}
    for name, needed in names.holders(key for key in names.official_keys(config) if key not in names.ALIASES).items():
        held = holders.get(name, [None] * len(needed))
        key = next((key for key, there in zip(needed, held, strict=True) if there is None), held[0])
        foreign[name] = (key.removeprefix(taken_off), len(needed))
    extras = {key: state[taken_off + key] for key in names.OPENAI_EXTRAS if layout == "openai" and taken_off + key in state}
    unknown = [key.removeprefix(taken_off) for key in state if names.our_name(key) is None]
    return Read(config, weights, source, fresh, layout, foreign, extras, tuple(key for key in unknown if key not in extras))


# Layers of the published ViT CLIPs by width: depth is read off the names, so a file that lost its last blocks would pass for a smaller model.
_PUBLISHED_DEPTHS = {"pair_encoder": {768: 12, 1024: 24}, "text_encoder": {768: 12}}


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({match[1] for name in weights if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))})


def _config_from_shapes(
    weights: Mapping[str, Tensor],
    found_in: Mapping[str, str],
    source: str,
    taken_off: str,
    intra_layers: int | None,
    pair_input: str | None,
) -> ModelConfig:
    def shape(key: str, rank: int) -> tuple[int, ...]:
        name, _ = names.our_name(key)
        key = found_in.get(name, key).removeprefix(taken_off)
        if name not in weights:
            raise FastidcError(f"{source}: tensor {key} is missing; this is not a ViT CLIP or CLIP4IDC checkpoint.")
        if weights[name].dim() != rank:
            raise FastidcError(f"{source}: tensor {key} has shape {list(weights[name].shape)}, {rank} dimensions were expected.")
        return tuple(weights[name].shape)

    vision_width, _, _, patch_size = shape("clip.visual.conv1.weight", 4)
    vocab_size, text_width = shape("clip.token_embedding.weight", 2)
    embed_dim = shape("clip.text_projection", 2)[1]
    if text_width != embed_dim:
        raise FastidcError(
            f"{source}: the text tower's width {text_width} differs from the joint space's {embed_dim}; "
            "CLIP4IDC's captioner ties them, so this CLIP cannot serve."
        )
    for tower, width in (("pair_encoder", vision_width), ("text_encoder", text_width)):
        found, whole = _count(weights, f"{tower}.blocks"), _PUBLISHED_DEPTHS[tower].get(width)
        if whole is not None and found != whole:
            raise FastidcError(
                f"{source}: {found} of the {whole} layers that a CLIP of width {width} has are in the {tower.replace('_', ' ')}; the file is cut."
            )
    side = round((shape("clip.visual.positional_embedding", 2)[0] - 1) ** 0.5)
    layers = _count(weights, "pair_encoder.blocks")
    values = dict(
        image_size=side * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers,
        intra_layers=intra_layers if intra_layers is not None else default_intra_layers(layers),
        embed_dim=embed_dim,
        text_layers=_count(weights, "text_encoder.blocks"),
        vocab_size=vocab_size,
        context_length=shape("clip.positional_embedding", 2)[0],
        captioner_layers=0,
        pair_input=pair_input or "concat",
    )
    return ModelConfig.from_dict(values, source)


def default_intra_layers(vision_layers: int) -> int:
    """The paper's share, 9 of 12: what a file that does not say its split is read with."""
    return max(1, round(vision_layers * 0.75))
