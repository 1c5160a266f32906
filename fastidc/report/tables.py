"""A run's figures as the page's tables."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastidc.data.records import read_json
from fastidc.errors import FastidcError
from fastidc.evaluate import paper
from fastidc.evaluate.blocks import METRICS
from fastidc.evaluate.intervals import LEVEL
from fastidc.evaluate.scorecard import Scorecard, named_blocks
from fastidc.report.page import Cell, Table

_DIRECTIONS = {"text_to_pair": "sentence to pair", "pair_to_text": "pair to sentences"}


def caption_scores(card: Scorecard) -> Table:
    """Scores times 100, a row for each kind of pair, with bootstrap intervals where they were asked for, and the best constant caption."""
    rows = []
    for name, block in named_blocks(card.scores):
        intervals = block.get("intervals") or {}
        rows.append((name, [Cell(str(block["pairs"])), *(_cell(block.get(metric), intervals.get(metric)) for metric in METRICS)]))
    notes = []
    if card.resamples:
        notes.append(f"Small figures: the middle {LEVEL:.0%} of {card.resamples:,} resamples of the pairs, seed {card.seed}.")
    if card.constant is not None:
        block = card.constant[1]["overall"]
        rows.append(("constant caption", [Cell(str(block["pairs"])), *(_cell(block.get(metric)) for metric in METRICS)]))
        notes.append(f'Constant caption: "{card.constant[0]}" for every pair, the best of the references.')
    overall = card.scores["overall"]
    notes += [f"METEOR -: {overall['METEOR_reason']}"] if "METEOR_reason" in overall else []
    notes += [f"Tokenised without Java: {overall['tokenizer_reason']}"] if "tokenizer_reason" in overall else []
    return Table(["scores x 100", "pairs", *METRICS], rows, [*notes, *card.warnings])


def _cell(value: float | None, interval: list[float] | None = None) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{100 * value:.2f}", "" if interval is None else f"{100 * interval[0]:.1f}\u2013{100 * interval[1]:.1f}")


def retrieval_scores(found: Mapping[str, Any], legacy: Mapping[str, Any] | None) -> Table:
    """``splits.test`` of an adapted run's metrics.json, and ``legacy_ties.test`` beside it where the run has them."""
    runs = {"strict": found} | ({"legacy": legacy} if legacy else {})
    cuts = [name for name in found["text_to_pair"] if name.startswith("R@")]
    rows = []
    for ties, metrics in runs.items():
        for direction, name in _DIRECTIONS.items():
            values = metrics[direction]
            cells = [Cell(f"{values[cut]:.1f}") for cut in cuts]
            rows.append(
                (f"{name}, {ties} ties", [Cell(str(values["queries"])), *cells, Cell(f"{values['MdR']:g}"), Cell(f"{values['MnR']:.1f}")])
            )
    notes = ["Recall in percent among the whole split. Strict: a tie is a loss. Legacy: the official code's, for published numbers."]
    return Table(["recall", "queries", *cuts, "MdR", "MnR"], rows, notes)


def paper_captions(dataset: str, card: Scorecard) -> list[str]:
    """The paper's table beside ours, for the data sets that the paper has."""
    return [paper.caption_table(dataset, card.scores)] if dataset in paper.PAPER else []


def paper_retrieval(dataset: str, found: Mapping[str, Any], legacy: Mapping[str, Any] | None) -> list[str]:
    """The same of retrieval; nothing for a run of an older kind, which lacks a cut-off of the paper."""
    if dataset not in paper.PAPER:
        return []
    try:
        return [paper.retrieval_table(dataset, {"strict": found} | ({"legacy": legacy} if legacy else {}))]
    except FastidcError:
        return []


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """metrics.json of a run folder, {} where the run has not come so far. FastidcError where the file is damaged."""
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise FastidcError(f"{path}: an object was expected; run `fastidc evaluate run` to see the scores, or delete the file.")
    return values
