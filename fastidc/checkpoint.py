"""Reading and writing weights. The only file that knows foreign parameter names: OpenAI CLIP, open_clip, official CLIP4IDC.

Everything foreign is read without running code from it: safetensors, or ``torch.load(weights_only=True)``. OpenAI's own downloads are
TorchScript archives, which ``weights_only`` cannot read; they go through ``torch.jit.load``, which holds no pickled Python.
"""

import dataclasses
import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastidc.config import ModelConfig
from fastidc.errors import FastidcError
from fastidc.files import write_json

FORMAT = "fastidc"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

# What CLIP lacks and CLIP4IDC adds to the towers (clip4idc.md 1.2); fresh where the source is a CLIP.
PAIR_PARAMETERS = (
    "pair_encoder.before_embedding",
    "pair_encoder.after_embedding",
    "pair_encoder.joint_position",
    "pair_encoder.inter_norm.",
)

_BLOCK = {
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.in_proj_": "attention.qkv.",
    "attn.out_proj": "attention.out",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_EXACT = {
    "clip.visual.conv1.weight": "pair_encoder.patch_embed.weight",
    "clip.visual.class_embedding": "pair_encoder.patch_embed.class_token",
    "clip.visual.positional_embedding": "pair_encoder.patch_embed.position",
    "clip.visual.joint_positional_embedding": "pair_encoder.joint_position",
    "clip.visual.bef_embedding": "pair_encoder.before_embedding",
    "clip.visual.aft_embedding": "pair_encoder.after_embedding",
    "clip.visual.proj": "pair_encoder.projection",
    "clip.token_embedding.weight": "text_encoder.token_embedding",
    "clip.positional_embedding": "text_encoder.position",
    "clip.text_projection": "text_encoder.projection",
    "clip.logit_scale": "logit_scale",
    "decoder.classifier.cls.predictions.bias": "captioner.head_bias",
}
_PREFIXES = {
    "clip.visual.ln_pre.": "pair_encoder.patch_embed.norm.",
    "clip.visual.ln_mid.": "pair_encoder.inter_norm.",
    "clip.visual.ln_post.": "pair_encoder.norm.",
    "clip.ln_final.": "text_encoder.norm.",
    "decoder.embeddings.LayerNorm.": "captioner.embed_norm.",
    "decoder.classifier.cls.predictions.transform.dense.": "captioner.head.",
    "decoder.classifier.cls.predictions.transform.LayerNorm.": "captioner.head_norm.",
}
_CAPTIONER_LAYER = {
    "slf_attn.output.dense": "attention.out",
    "slf_attn.output.LayerNorm": "attention_norm",
    "enc_attn.output.dense": "cross.out",
    "enc_attn.output.LayerNorm": "cross_norm",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
    "output.LayerNorm": "feed_forward.norm",
}
# Three official keys that share storage with the text tower's tables; in a file they win over the `clip.` ones, as in the official loader.
_ALIASES = {
    "decoder.embeddings.word_embeddings.weight": "clip.token_embedding.weight",
    "decoder.classifier.cls.predictions.decoder.weight": "clip.token_embedding.weight",
    "decoder.embeddings.position_embeddings.weight": "clip.positional_embedding",
}


def our_name(official: str) -> tuple[str, int | None] | None:
    """Our name of an official parameter and, where it is one part of a packed projection, its place (query, key, value); None if unknown."""
    official = _ALIASES.get(official, official)
    if official in _EXACT:
        return _EXACT[official], None
    for old, new in _PREFIXES.items():
        if official.startswith(old):
            return new + official.removeprefix(old), None
    if match := re.fullmatch(r"clip\.(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", official):
        tower = "pair_encoder" if match[1] else "text_encoder"
        for old, new in _BLOCK.items():
            if match[3].startswith(old):
                return f"{tower}.blocks.{match[2]}.{new}{match[3].removeprefix(old)}", None
    if match := re.fullmatch(r"decoder\.(encoder|decoder)\.layer\.(\d+)\.(.+)\.(weight|bias)", official):
        layer = f"captioner.{match[1]}.{match[2]}"
        if part := re.fullmatch(r"(slf|enc)_attn\.att\.(query|key|value)", match[3]):
            place = ("query", "key", "value").index(part[2])
            if part[1] == "slf":
                return f"{layer}.attention.qkv.{match[4]}", place
            return (f"{layer}.cross.q.{match[4]}", None) if place == 0 else (f"{layer}.cross.kv.{match[4]}", place - 1)
        if match[3] in _CAPTIONER_LAYER:
            return f"{layer}.{_CAPTIONER_LAYER[match[3]]}.{match[4]}", None
    return None


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> ours: queries, keys and values of the captioner packed, aliases folded, unknown keys left out."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key in sorted(state, key=lambda k: k in _ALIASES):
        if (named := our_name(key)) is None:
            continue
        name, place = named
        if place is None:
            whole[name] = state[key]
        else:
            parts.setdefault(name, {})[place] = state[key]
    for name, found in parts.items():
        if len(found) == (3 if ".qkv." in name else 2):
            whole[name] = torch.cat([found[i] for i in range(len(found))])
    return whole


def to_official(weights: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Tensor]:
    """Our tensors (or their gradients) under the official names ``keys``; KeyError for a name that we do not have."""
    out = {}
    for key in keys:
        if (named := our_name(key)) is None:
            raise KeyError(key)
        name, place = named
        tensor = weights[name]
        out[key] = tensor if place is None else tensor.chunk(3 if ".qkv." in name else 2)[place]
    return out


@dataclass(frozen=True)
class Read:
    """What a source held: the model's config, its weights under our names, and which of the config's parts it lacks."""

    config: ModelConfig
    weights: dict[str, Tensor]
    source: str
    fresh: tuple[str, ...] = ()


def read(
    source: str | os.PathLike, *, intra_layers: int | None = None, captioner_layers: int | None = None, pair_input: str | None = None
) -> Read:
    """Reads any source that `CLIP4IDC.from_pretrained` accepts; FastidcError names what does not fit."""
    source = os.fspath(source)
    if source.startswith("open_clip:"):
        return _read_clip(_open_clip_state(source), source, intra_layers, captioner_layers, pair_input)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, intra_layers, captioner_layers, pair_input)
    if not path.is_file():
        raise FastidcError(f"{source}: no such checkpoint; give a fastidc folder, a checkpoint file or open_clip:NAME/TAG.")
    return _read_clip(_load_file(path), source, intra_layers, captioner_layers, pair_input)


def _read_folder(path: Path, intra_layers: int | None, captioner_layers: int | None, pair_input: str | None) -> Read:
    config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not config_path.is_file():
        raise FastidcError(f"{path}: no {CONFIG_FILE} in this folder; give the folder of a fastidc run, or a checkpoint file.")
    if not weights_path.is_file():
        raise FastidcError(f"{path}: no {WEIGHTS_FILE} in this folder; the run that wrote it has not finished.")
    values = read_config(path)
    if missing := sorted({field.name for field in dataclasses.fields(ModelConfig)} - set(values["model"])):
        raise FastidcError(f"{config_path}: field model.{missing[0]} is missing; the file is damaged or from another version of fastidc.")
    config = ModelConfig.from_dict(values["model"], str(config_path))
    for name, given in (("intra_layers", intra_layers), ("pair_input", pair_input)):
        if given not in (None, getattr(config, name)):
            raise FastidcError(f"{config_path}: the model has {name} {getattr(config, name)}, which is part of it; {given} was asked for.")
    fresh: tuple[str, ...] = ()
    if captioner_layers not in (None, config.captioner_layers):
        if config.captioner_layers:
            raise FastidcError(f"{config_path}: the captioner has {config.captioner_layers} layers; {captioner_layers} were asked for.")
        config, fresh = config.replace(captioner_layers=captioner_layers), ("captioner.",)
    return Read(config, _load_file(weights_path), str(weights_path), fresh)


def read_config(folder: str | os.PathLike) -> dict:
    """The ``config.json`` of a fastidc folder, checked for being one."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FastidcError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("model"), dict):
        raise FastidcError(f'{path}: not a fastidc config: the fields "format": "fastidc" and "model" are missing.')
    return values


def write_config(folder: str | os.PathLike, config: ModelConfig, extra: Mapping | None = None) -> None:
    """Writes ``config.json``: the model's config and whatever else describes the run."""
    write_json(Path(folder) / CONFIG_FILE, {"format": FORMAT, "version": 1, "model": config.to_dict(), **(extra or {})})


def save(folder: str | os.PathLike, config: ModelConfig, weights: Mapping[str, Tensor], extra: Mapping | None = None) -> None:
    """Writes ``config.json`` and then ``model.safetensors`` into ``folder``, each aside and renamed."""
    from safetensors.torch import save_file

    write_config(folder, config, extra)
    aside = Path(folder) / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, aside, metadata={"format": "pt"})
    os.replace(aside, Path(folder) / WEIGHTS_FILE)


def check_fit(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], source: str, fresh: Sequence[str] = ()) -> None:
    """FastidcError unless ``weights`` has every name of ``shapes`` with its shape; names under ``fresh`` may be absent."""
    for name, shape in shapes.items():
        if name not in weights:
            if name.startswith(tuple(fresh)):
                continue
            missing = sum(n not in weights and not n.startswith(tuple(fresh)) for n in shapes)
            raise FastidcError(f"{source}: tensor {name} is missing ({missing} in all); this file does not hold the whole model.")
        if tuple(weights[name].shape) != tuple(shape):
            raise FastidcError(f"{source}: tensor {name} has shape {list(weights[name].shape)}, the model needs {list(shape)}.")


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                is_torchscript = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if is_torchscript:
                with warnings.catch_warnings():  # torch announces the end of torch.jit, which is no news to a reader of old files
                    warnings.simplefilter("ignore", FutureWarning)
                    return dict(torch.jit.load(path, map_location="cpu").state_dict())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FastidcError:
        raise
    except Exception as error:  # every reader has its own exceptions for a damaged or a foreign file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FastidcError(f"{path}: cannot be read as a checkpoint ({reason[0][:200]}).") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise FastidcError(f"{path}: not a state dict; a dictionary of named tensors was expected.")
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _open_clip_state(source: str) -> dict[str, Tensor]:
    name, _, tag = source.removeprefix("open_clip:").partition("/")
    try:
        import open_clip
    except ImportError as error:
        raise FastidcError(f"{source}: open_clip cannot be imported ({error}); pip install open_clip_torch.") from None
    if name not in open_clip.list_models():
        raise FastidcError(f"{source}: open_clip knows no model {name!r}; give for example open_clip:ViT-B-32-quickgelu/openai.")
    model_config = open_clip.get_model_config(name)
    if not isinstance(model_config.get("vision_cfg", {}).get("layers"), int):
        raise FastidcError(
            f"{source}: {name} has no vision transformer (a ResNet?); CLIP4IDC splits one, so give a ViT such as ViT-B-32-quickgelu."
        )
    if not model_config.get("quick_gelu"):
        raise FastidcError(
            f"{source}: {name} computes GELU where OpenAI's weights and CLIP4IDC need QuickGELU; use open_clip:{name}-quickgelu/{tag or 'openai'}."
        )
    try:
        model = open_clip.create_model(name, pretrained=tag or None)
    except Exception as error:
        raise FastidcError(f"{source}: open_clip could not load it ({str(error).splitlines()[0][:200]}).") from None
    return model.state_dict()


def _read_clip(
    state: dict[str, Tensor], source: str, intra_layers: int | None, captioner_layers: int | None, pair_input: str | None
) -> Read:
    """A CLIP state dict, or an official CLIP4IDC file of either stage: every hyper-parameter from the shapes (clip4idc.md 1.4)."""
    official = any(key.startswith("clip.") for key in state)
    if not official:
        state = {f"clip.{key}": value for key, value in state.items()}
    if any(key.startswith("clip.visual.layer1.") for key in state):
        raise FastidcError(f"{source}: this is a ResNet CLIP; CLIP4IDC splits a vision transformer, so give a ViT one (ViT-B-32, ...).")
    weights = {name: value.float() for name, value in from_official(state).items()}
    config = _config_from_shapes(weights, source, intra_layers, pair_input)
    has_captioner = any(name.startswith("captioner.") for name in weights)
    fresh: tuple[str, ...] = () if official else PAIR_PARAMETERS
    if has_captioner:
        layers = _count(weights, "captioner.decoder")
        if captioner_layers not in (None, layers):
            raise FastidcError(f"{source}: the captioner has {layers} layers; {captioner_layers} were asked for.")
    else:
        layers, fresh = captioner_layers or 0, (*fresh, "captioner.")
    return Read(config.replace(captioner_layers=layers), weights, source, fresh)


# Layers of the published ViT CLIPs by width: depth is read off the names, so a file that lost its last blocks would pass for a smaller model.
_PUBLISHED_DEPTHS = {"pair_encoder": {768: 12, 1024: 24}, "text_encoder": {768: 12}}


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({match[1] for name in weights if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))})


def _config_from_shapes(weights: Mapping[str, Tensor], source: str, intra_layers: int | None, pair_input: str | None) -> ModelConfig:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in weights:
            raise FastidcError(f"{source}: tensor {name} is missing; this is not a ViT CLIP or CLIP4IDC checkpoint.")
        if weights[name].dim() != rank:
            raise FastidcError(f"{source}: tensor {name} has shape {list(weights[name].shape)}, {rank} dimensions were expected.")
        return tuple(weights[name].shape)

    vision_width, _, _, patch_size = shape("pair_encoder.patch_embed.weight", 4)
    vocab_size, text_width = shape("text_encoder.token_embedding", 2)
    embed_dim = shape("text_encoder.projection", 2)[1]
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
    side = round((shape("pair_encoder.patch_embed.position", 2)[0] - 1) ** 0.5)
    layers = _count(weights, "pair_encoder.blocks")
    values = dict(
        image_size=side * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers,
        intra_layers=intra_layers if intra_layers is not None else max(1, round(layers * 0.75)),
        embed_dim=embed_dim,
        text_layers=_count(weights, "text_encoder.blocks"),
        vocab_size=vocab_size,
        context_length=shape("text_encoder.position", 2)[0],
        captioner_layers=0,
        pair_input=pair_input or "concat",
    )
    return ModelConfig.from_dict(values, source)
