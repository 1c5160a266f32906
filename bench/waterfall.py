"""What each feature of fastidc is worth to a whole training step: variants with all features up to one of them, in a fixed order.

A feature is switched off through the product's own switches, or by the layout of the batch (`bench.peers.ours.build`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.peers.stepper import Stage

PEERS = ("A official", "B idiomatic", "B idiomatic compiled")
PLAIN, OURS = "fastidc plain", "fastidc"


@dataclass(frozen=True)
class Feature:
    """``off``: the options of `bench.peers.ours.build` under which fastidc is without it. ``device``: the one that can have it,
    where not all can."""

    name: str
    off: Mapping[str, Any]
    stages: tuple[Stage, ...] = ("adapt", "finetune")
    device: str | None = None


# In the order of the picture; the next feature is one more line. What the backward pass leaves out for frozen layers and matrices has no bar:
# with it they would train. Nor has what is made again instead of kept, which saves memory; FP8, which gives other numbers; and bf16 buckets,
# which several GPUs have.
FEATURES = (
    Feature("bf16", {"precision": "fp32"}),
    Feature("no text tower", {"text_tower": True}, ("finetune",)),
    Feature("shared before-image", {"shared": False}, ("finetune",)),
    Feature("two-token last layer", {"all_tokens": True}, ("adapt",)),
    Feature("end-token last layer", {"all_words": True}, ("adapt",)),
    Feature("packed captions", {"packed": False}),
    Feature("layer_norm=triton", {"backends": "layer_norm=torch"}, device="cuda"),
    Feature("quick_gelu=triton", {"backends": "quick_gelu=torch"}, device="cuda"),
    Feature("attention=triton", {"backends": "attention=sdpa"}, device="cuda"),
    Feature("info_nce=triton", {"backends": "info_nce=torch"}, ("adapt",), device="cuda"),
    Feature("linear_cross_entropy=triton", {"backends": "linear_cross_entropy=torch"}, ("finetune",), device="cuda"),
    Feature("bert_adam=triton", {"backends": "bert_adam=torch"}, device="cuda"),
    Feature("shadow weights", {"shadows": False}),
    Feature("compiled captioner", {"compiling": "off"}, ("finetune",), device="cuda"),
    Feature("graph", {"graph": "off"}, device="cuda"),
)


def rungs(stage: Stage, bf16: bool, device: str) -> dict[str, dict[str, Any]]:
    """{name of a variant: options of `bench.peers.ours.build`}, from no feature to all but the last; with all of them it is fastidc itself.

    A feature that the case cannot have, as bf16 and shadow weights in an fp32 case and kernels on a CPU, has no rung."""
    features = _features(stage, bf16, device)
    names = [PLAIN, *(_named(feature) for feature in features[:-1])]
    return {name: _without(features[i:]) for i, name in enumerate(names)}


def _features(stage: Stage, bf16: bool, device: str) -> list[Feature]:
    half = ("bf16", "shadow weights")
    return [f for f in FEATURES if stage in f.stages and f.device in (None, device) and (bf16 or f.name not in half)]


def _without(features: Sequence[Feature]) -> dict[str, Any]:
    """Options that switch all of them off."""
    off = {key: value for feature in features for key, value in feature.off.items()}
    backends = [feature.off["backends"] for feature in features if "backends" in feature.off]
    return off | ({"backends": ",".join(backends)} if backends else {})


def order(names: set[str]) -> list[str]:
    """Those of ``names`` that have a place in the waterfall, in its order."""
    return [name for name in (*PEERS, PLAIN, *map(_named, FEATURES), OURS) if name in names]


def is_rung(name: str) -> bool:
    """Whether ``name`` is fastidc without some of its features."""
    return name == PLAIN or name in map(_named, FEATURES)


def last_feature(stage: Stage, bf16: bool, device: str) -> str:
    """What fastidc itself has beyond the rung before it."""
    return _named(_features(stage, bf16, device)[-1])


def _named(feature: Feature) -> str:
    return f"fastidc +{feature.name}"
