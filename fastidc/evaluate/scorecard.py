"""Predictions against references, as `fastidc evaluate` reports them: scores with intervals, what was odd, and the best constant caption.

Scored exactly as pycocoevalcap scores them, empty references and captions included, which are named in ``warnings``.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError
from fastidc.evaluate.blocks import METRICS
from fastidc.evaluate.captions import CaptionScorer
from fastidc.evaluate.intervals import IDF_NOTE, LEVEL, RESAMPLES
from fastidc.evaluate.report import ruled
from fastidc.files import write_text

COCO_NAMES = {"BLEU-1": "Bleu_1", "BLEU-2": "Bleu_2", "BLEU-3": "Bleu_3", "BLEU-4": "Bleu_4", "ROUGE-L": "ROUGE_L"}
"""Names of metrics in JSON and CSV, as pycocoevalcap has them; METEOR and CIDEr have the same."""
_NAMED = 5  # ids that a message lists


@dataclass(frozen=True)
class Scorecard:
    """``scores``: blocks as `CaptionScorer.examine` gives them. ``constant``: (caption, its blocks). ``captions``: id -> its own scores."""

    scores: dict[str, Any]
    constant: tuple[str, dict[str, Any]] | None
    captions: dict[str, dict[str, float | None]]
    hypotheses: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    resamples: int = RESAMPLES
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Raw values under pycocoevalcap's names: the blocks at the top, then ``constant``, ``bootstrap``, ``warnings`` and ``reasons``."""
        overall = self.scores["overall"]
        content = {name: _renamed(block) for name, block in self.scores.items()}
        if self.constant is not None:
            content["constant"] = {"caption": self.constant[0], **{name: _renamed(block) for name, block in self.constant[1].items()}}
        bootstrap = {"level": LEVEL, "resamples": self.resamples, "seed": self.seed, "unit": "pair", "idf": IDF_NOTE}
        reasons = {name.removesuffix("_reason"): reason for name, reason in overall.items() if name.endswith("_reason")}
        return content | {"bootstrap": bootstrap, "tokenizer": overall["tokenizer"], "reasons": reasons, "warnings": self.warnings}

    def write_csv(self, path: str | os.PathLike[str]) -> Path:
        """One row a caption: image_id, caption and its scores (CIDEr with the whole set's document frequencies; no METEOR: empty)."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image_id", "caption", *(COCO_NAMES.get(metric, metric) for metric in METRICS)])
        for pair, values in self.captions.items():
            table.writerow([pair, self.hypotheses[pair], *("" if values[metric] is None else repr(values[metric]) for metric in METRICS)])
        return write_text(path, text.getvalue())

    def table(self) -> str:
        """Scores times 100, a row for each subset with its interval below it, and the best constant caption."""
        rows = [["scores x 100", "pairs", *METRICS]]
        for name, block in named_blocks(self.scores):
            rows.append([name, str(block["pairs"]), *(_times_100(block[metric]) for metric in METRICS)])
            if intervals := block.get("intervals"):
                rows.append(["", "", *(_range(intervals[metric]) for metric in METRICS)])
        if self.constant is not None:
            block = self.constant[1]["overall"]
            rows.append(["constant caption", str(block["pairs"]), *(_times_100(block[metric]) for metric in METRICS)])
        overall = self.scores["overall"]
        notes = [f"below each: 95 % of {self.resamples} resamples of the pairs, seed {self.seed}; {IDF_NOTE}"] if self.resamples else []
        if self.constant is not None:
            notes.append(f'constant caption: "{self.constant[0]}" for every pair')
        notes += [f"METEOR -: {overall['METEOR_reason']}"] if "METEOR_reason" in overall else []
        notes += [f"tokenised without Java: {overall['tokenizer_reason']}"] if "tokenizer_reason" in overall else []
        return "\n".join([*ruled(rows), "", *notes])


def named_blocks(scores: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(name of a row, its block): overall, change, no change, the types, the IoU bins."""
    for name in ("overall", "change", "no_change"):
        if name in scores:
            yield name.replace("_", " "), scores[name]
    for group, prefix in (("types", "  "), ("iou", "  IoU ")):
        yield from ((prefix + kind, block) for kind, block in scores.get(group, {}).items())


def match(
    references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], subset: bool, names: tuple[object, object]
) -> tuple[dict[str, str], list[str]]:
    """The captions to score, in the order of the references, and a warning where that is not all.

    Raises FastidcError, counting and naming the ids that are in one file alone, unless ``subset``; and where no id is in both. ``names``:
    the files of references and captions, for the sentence.
    """
    both = {pair: hypotheses[pair] for pair in references if pair in hypotheses}
    lonely = [pair for pair in references if pair not in hypotheses], [pair for pair in hypotheses if pair not in references]
    if not both:
        raise FastidcError(
            f"{names[1]} and {names[0]} have no id in common (it has {_ids(lonely[1])}; the references have {_ids(lonely[0])}); give the "
            "references of the pairs that were captioned."
        )
    parts = [
        f"{_ids(ids)} without a caption" if place == 0 else f"{_ids(ids)} without references" for place, ids in enumerate(lonely) if ids
    ]
    if not parts:
        return both, []
    sentence = f"{names[1]} and {names[0]} differ in their ids: {' and '.join(parts)}"
    if not subset:
        raise FastidcError(f"{sentence}; correct one of the files, or score the {len(both):,} ids in both with --subset.")
    return both, [f"{sentence}; the {len(both):,} ids in both are scored."]


def _ids(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(pair) for pair in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
    return f"{len(ids):,} id{'' if len(ids) == 1 else 's'}" + (f" ({shown})" if ids else "")


def score(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    types: Mapping[str, str] | None = None,
    overlaps: Mapping[str, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    constant: bool = True,
    warnings: Sequence[str] = (),
    report: Callable[[str], None] | None = None,
) -> Scorecard:
    """Score ``hypotheses``, each of which has references (`match`), with one METEOR process for everything.

    ``resamples``: of the bootstrap; 0 leaves intervals out. ``constant``: find the best constant caption and score it too. ``warnings``:
    those that there are already. ``report`` is told every warning.
    """
    if resamples < 0 or seed < 0:
        raise FastidcError(f"the bootstrap cannot have {resamples} resamples with seed {seed}; give numbers from 0.")
    said = list(warnings)
    with CaptionScorer(references, keep_empty_references=True, progress=True) as scorer:
        examined = scorer.examine(hypotheses, types, overlaps, resamples, seed, constant and any_words(references, hypotheses))
    if examined.empty_references:
        said.append(
            f"{_ids(examined.empty_references)} with an empty reference, scored as pycocoevalcap does: an empty caption gets ROUGE-L 1 for "
            "one, and no length penalty."
        )
    if examined.empty_captions:
        said.append(f"{_ids(examined.empty_captions)} with an empty caption, scored as pycocoevalcap does.")
    for sentence in said if report else ():
        report(sentence)
    return Scorecard(examined.scores, examined.constant, examined.captions, dict(hypotheses), said, resamples, seed)


def any_words(references: Mapping[str, Sequence[str]], pairs: Iterable[str]) -> bool:
    """Whether a reference of ``pairs`` has a letter or digit, so that there is a candidate for a constant caption."""
    return any(character.isalnum() for pair in pairs for text in references[pair] for character in text)


def _renamed(block: Mapping[str, Any]) -> dict[str, Any]:
    return {COCO_NAMES.get(name, name): _renamed(value) if isinstance(value, Mapping) else value for name, value in block.items()}


def _times_100(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
