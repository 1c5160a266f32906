"""What a set of captions is told about itself: a block of scores for each subset of the pairs, and the scores of every caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastidc.evaluate.changes import CHANGE_TYPES, is_no_change_id
from fastidc.evaluate.intervals import caption_intervals
from fastidc.evaluate.ngrams import Ngrams, bleu_of

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
IOU_BINS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
"""[from, to) of the overlap of the changed object's boxes before and after; the last one holds 1.0 also."""


@dataclass(frozen=True)
class Examined:
    """``scores``: as `score_by_subset`, each block with ``intervals``; ``captions``: id -> `METRICS` -> that caption's own score, CIDEr with
    the document frequencies of the whole set. ``empty_references``, ``empty_captions``: ids, empty meaning without a token. ``constant``:
    one caption for all pairs and its blocks, where it was asked for."""

    scores: dict[str, Any]
    captions: dict[str, dict[str, float | None]]
    empty_references: list[str] = field(default_factory=list)
    empty_captions: list[str] = field(default_factory=list)
    constant: tuple[str, dict[str, Any]] | None = None


def subsets_of(pairs: Sequence[str], types: Mapping[str, str] | None, overlaps: Mapping[str, float] | None = None) -> dict[str, list[str]]:
    """Name -> pairs: "overall", "change", "no_change", "types/KIND", "iou/FROM-TO"; those without a pair are left out.

    ``types`` and ``overlaps`` are looked up for change pairs alone. Where there is neither a type nor a no-change id, "overall" is all.
    """
    no_change = [pair for pair in pairs if is_no_change_id(pair)]
    change = [pair for pair in pairs if not is_no_change_id(pair)]
    subsets = {"overall": list(pairs)}
    if no_change or types:
        subsets |= {"change": change, "no_change": no_change}
    known = {types[pair] for pair in change if pair in types} if types else set()
    for kind in [kind for kind in CHANGE_TYPES if kind in known] + sorted(known - set(CHANGE_TYPES)):
        subsets[f"types/{kind}"] = [pair for pair in change if types.get(pair) == kind]
    for low, high in IOU_BINS if overlaps else ():
        last = high == IOU_BINS[-1][1]
        chosen = [pair for pair in change if pair in overlaps and (low <= overlaps[pair] < high or (last and overlaps[pair] == high))]
        subsets[f"iou/{low:.1f}-{high:.1f}"] = chosen
    return {name: chosen for name, chosen in subsets.items() if chosen}


def nested(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """``{"overall": a, "types/add": b}`` as ``{"overall": a, "types": {"add": b}}``."""
    result: dict[str, Any] = {}
    for name, block in blocks.items():
        group, slash, kind = name.partition("/")
        if slash:
            result.setdefault(group, {})[kind] = block
        else:
            result[name] = block
    return result


def score_blocks(ngrams: Ngrams, subsets: Mapping[str, np.ndarray]) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """`METRICS` and ``pairs`` of each subset (indices [n]), METEOR still None; and each subset's CIDEr of its pairs [n]."""
    blocks, ciders = {}, {}
    for name, chosen in subsets.items():
        ciders[name] = ngrams.cider(chosen)
        values = [*bleu_of(ngrams.bleu[chosen].sum(axis=0)), None, ngrams.rouge[chosen].mean(), ciders[name].mean()]
        blocks[name] = {metric: None if value is None else float(value) for metric, value in zip(METRICS, values, strict=True)}
        blocks[name]["pairs"] = len(chosen)
    return blocks, ciders


def add_intervals(
    blocks: Mapping[str, dict],
    subsets: Mapping[str, np.ndarray],
    ngrams: Ngrams,
    ciders: Mapping[str, np.ndarray],
    statistics: np.ndarray | None,
    resamples: int,
    seed: int,
) -> None:
    """Puts ``intervals`` into every block; METEOR's is null where there are no ``statistics`` [N, 23] of `meteor_statistics`."""
    for name, chosen in subsets.items():
        block, meteor = blocks[name], None if statistics is None else statistics[chosen]
        found = caption_intervals(ngrams.bleu[chosen], ngrams.rouge[chosen], ciders[name], meteor, resamples, seed)
        block["intervals"] = {metric: found[metric] for metric in METRICS}
        if meteor is None:
            block["METEOR_interval_reason"] = block.get("METEOR_reason", "the jar's statistics are not METEOR 1.5's")


def each_caption(pairs: Sequence[str], ngrams: Ngrams, cider: np.ndarray, meteor: Sequence[float] | None) -> dict[str, dict]:
    """id -> `METRICS` of that caption; METEOR None where there is none."""
    columns = [*bleu_of(ngrams.bleu).T.tolist(), meteor or [None] * len(pairs), ngrams.rouge.tolist(), cider.tolist()]
    return {pair: dict(zip(METRICS, row, strict=True)) for pair, *row in zip(pairs, *columns, strict=True)}
