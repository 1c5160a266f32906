"""Foreign parameter names and ours. The only file that knows those of OpenAI CLIP, open_clip and official CLIP4IDC.

An official key is an OpenAI key with ``clip.`` before it, or one of the captioner's ``decoder.*``; `CLIP_PREFIX` is all that tells them apart.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastidc.config import ModelConfig

CLIP_PREFIX = "clip."
# What CLIP lacks and CLIP4IDC adds to the towers (clip4idc.md 1.2); fresh where the source is a CLIP.
PAIR_PARAMETERS = (
    "pair_encoder.before_embedding",
    "pair_encoder.after_embedding",
    "pair_encoder.joint_position",
    "pair_encoder.inter_norm.",
)
# Tensors of OpenAI's own files that are no parameters: the shapes say the same.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")

_BLOCK = {
    "attn.in_proj_": "attention.qkv.",
    "attn.out_proj.": "attention.out.",
    "ln_1.": "attention_norm.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ln_2.": "mlp_norm.",
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
ALIASES = {
    "decoder.embeddings.word_embeddings.weight": "clip.token_embedding.weight",
    "decoder.classifier.cls.predictions.decoder.weight": "clip.token_embedding.weight",
    "decoder.embeddings.position_embeddings.weight": "clip.positional_embedding",
}
_HALVES = re.compile(
    r"(pair_encoder\.(patch_embed\.weight|projection)|text_encoder\.projection"
    r"|(pair|text)_encoder\.blocks\.\d+\.(attention\.(qkv|out)|mlp\.fc[12])\.(weight|bias))"
)


def our_name(official: str) -> tuple[str, int | None] | None:
    """Our name of an official parameter and, where it is one part of a packed projection, its place (query, key, value); None if unknown."""
    official = ALIASES.get(official, official)
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


def _parts(name: str) -> int:
    """How many official tensors our packed ``name`` holds."""
    return 3 if ".qkv." in name else 2


def holders(keys: Iterable[str]) -> dict[str, list[str | None]]:
    """Our names -> the official keys among ``keys`` that hold them: one, or query, key, value of a packed projection (None where the part
    is absent). An alias wins over what it is an alias of; unknown keys are left out."""
    found: dict[str, list[str | None]] = {}
    for key in sorted(keys, key=lambda k: k in ALIASES):
        if (named := our_name(key)) is not None:
            name, place = named
            found.setdefault(name, [None] * (1 if place is None else _parts(name)))[place or 0] = key
    return found


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> ours: queries, keys and values of the captioner packed, aliases folded, unknown keys left out."""
    whole = {name: keys for name, keys in holders(state).items() if None not in keys}
    return {name: state[keys[0]] if len(keys) == 1 else torch.cat([state[key] for key in keys]) for name, keys in whole.items()}


def to_official(weights: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Tensor]:
    """Our tensors (or their gradients) under the official names ``keys``; KeyError for a name that we do not have."""
    out = {}
    for key in keys:
        if (named := our_name(key)) is None:
            raise KeyError(key)
        name, place = named
        tensor = weights[name]
        out[key] = tensor if place is None else tensor.chunk(_parts(name))[place]
    return out


def _both(*names: str) -> list[str]:
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def _block(prefix: str) -> list[str]:
    return [
        *(f"{prefix}.attn.in_proj_{leaf}" for leaf in ("weight", "bias")),
        *_both(*(f"{prefix}.{name}" for name in ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"))),
    ]


def _captioner_layer(prefix: str, attentions: Sequence[str]) -> list[str]:
    names = [f"{kind}.{part}" for kind in attentions for part in ("att.query", "att.key", "att.value", "output.dense", "output.LayerNorm")]
    return _both(*(f"{prefix}.{name}" for name in (*names, "intermediate.dense", "output.dense", "output.LayerNorm")))


def official_keys(config: ModelConfig, pair: bool = True) -> list[str]:
    """Every key of the official checkpoint of a model of this shape, aliases included, in the order in which the official model's
    ``state_dict()`` has them: a module's own parameters first, then its children, each in the order of their definition. So the text tower's
    tables come before the vision tower, and the captioner's decoder before its encoder; the goldens list the keys of a run of the official
    code in this very order. Without ``pair`` those of a CLIP alone."""
    vision, text = "clip.visual", "clip"
    keys = ["clip.positional_embedding", "clip.text_projection", "clip.logit_scale"]
    keys += [f"{vision}.class_embedding", f"{vision}.positional_embedding"]
    keys += [f"{vision}.{name}_embedding" for name in ("joint_positional", "bef", "aft") if pair]
    keys += [f"{vision}.proj", f"{vision}.conv1.weight", *_both(f"{vision}.ln_pre", *([f"{vision}.ln_mid"] if pair else []))]
    keys += [key for i in range(config.vision_layers) for key in _block(f"{vision}.transformer.resblocks.{i}")]
    keys += _both(f"{vision}.ln_post")
    keys += [key for i in range(config.text_layers) for key in _block(f"{text}.transformer.resblocks.{i}")]
    keys += ["clip.token_embedding.weight", *_both("clip.ln_final")]
    if pair and config.captioner_layers:
        keys += [f"decoder.embeddings.{name}_embeddings.weight" for name in ("word", "position")] + _both("decoder.embeddings.LayerNorm")
        for half, attentions in (("decoder", ("slf_attn", "enc_attn")), ("encoder", ("slf_attn",))):
            for i in range(config.captioner_layers):
                keys += _captioner_layer(f"decoder.{half}.layer.{i}", attentions)
        head = "decoder.classifier.cls.predictions"
        keys += [f"{head}.bias", *_both(f"{head}.transform.dense", f"{head}.transform.LayerNorm"), f"{head}.decoder.weight"]
    return keys


def is_half_officially(name: str) -> bool:
    """Whether the official code keeps the parameter that we call ``name`` in fp16 for good: weights, optimiser state and checkpoints
    (clip4idc.md 1.3). These are the linear maps and projections of both towers and the patch embedding; norms, tables, embeddings,
    ``logit_scale`` and the whole captioner are fp32."""
    return _HALVES.fullmatch(name) is not None


def official_dtypes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` (our names) in the dtypes of the official regime, fp16 where `is_half_officially` and fp32 elsewhere."""
    return {name: tensor.to(torch.float16 if is_half_officially(name) else torch.float32) for name, tensor in weights.items()}
