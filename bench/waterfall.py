"""What each feature of fastidc is worth to a whole training step: variants with all features up to one of them, in a fixed order.

A feature is switched off through the product's own switches, or by the layout of the batch (`bench.peers.ours.build`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.peers.stepper import Stage

PEERS = ("A official", "B idiomatic", "B idiomatic compiled")
PLAIN, OURS = "fastidc plain", "fastidc"


@dataclass(frozen=True)
class Feature:
    """``off``: the options of `bench.peers.ours.build` under which fastidc is without it."""

    name: str
    off: Mapping[str, Any]
    stages: tuple[Stage, ...] = ("adapt", "finetune")


# In the order of the picture; the next feature is one more line.
FEATURES = (
    Feature("bf16", {"precision": "fp32"}),
    Feature("two-token last layer", {"all_tokens": True}, ("adapt",)),
    Feature("shared before-image", {"shared": False}, ("finetune",)),
    Feature("packed captions", {"packed": False}, ("adapt",)),
    Feature("compiled captioner", {"compiling": "off"}, ("finetune",)),
    Feature("attention=triton", {"backends": "attention=sdpa"}),
)


def rungs(stage: Stage, bf16: bool) -> dict[str, dict[str, Any]]:
    """{name of a variant: options of `bench.peers.ours.build`}, from no feature to all but the last; with all of them it is fastidc itself.

    Without ``bf16`` (an fp32 case) that feature has no rung."""
    features = [f for f in FEATURES if stage in f.stages and (bf16 or "precision" not in f.off)]
    names = [PLAIN, *(_named(feature) for feature in features[:-1])]
    return {name: {k: v for feature in features[i:] for k, v in feature.off.items()} for i, name in enumerate(names)}


def order(names: set[str]) -> list[str]:
    """Those of ``names`` that have a place in the waterfall, in its order."""
    return [name for name in (*PEERS, PLAIN, *map(_named, FEATURES), OURS) if name in names]


def is_rung(name: str) -> bool:
    """Whether ``name`` is fastidc without some of its features."""
    return name == PLAIN or name in map(_named, FEATURES)


def last_feature(stage: Stage) -> str:
    """What fastidc itself has beyond the rung before it."""
    return _named([feature for feature in FEATURES if stage in feature.stages][-1])


def _named(feature: Feature) -> str:
    return f"fastidc +{feature.name}"
