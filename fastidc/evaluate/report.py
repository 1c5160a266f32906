"""The score table as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastidc.evaluate.captions import METRICS

_SUBSETS = {"overall": "overall", "change": "change", "no_change": "no change"}


@dataclass(frozen=True)
class _Table:
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def format_table(metrics: Mapping[str, Any], constant: tuple[str, Mapping[str, Any]] | None = None) -> str:
    """Fixed-width table of `score_by_subset`'s result (or of `score_captions`'), values times 100 as papers print them.

    One row each for overall, change, no change and the types. ``constant``: what `best_constant_caption` gave; the last column is then
    the CIDEr of that one caption on the same pairs. METEOR that could not be had is "-", with the reason below. Other entries of
    ``metrics`` (change accuracy, retrieval) follow as ``name  value``, as they are.
    """
    table = _score_table(metrics, constant)
    lines = ruled([table.columns, *table.rows]) if table.rows else []
    others = [list(item) for item in other_values(metrics)]
    if others:
        lines += ["", *_aligned(others)] if lines else _aligned(others)
    return "\n".join([*lines, *([""] if table.notes else []), *table.notes])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip() for row in rows]


def ruled(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of ``rows`` in columns, the first to the left and the others to the right; the first row is the head, with a rule below it."""
    lines = _aligned(rows)
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _score_table(metrics: Mapping[str, Any], constant: tuple[str, Mapping[str, Any]] | None) -> _Table:
    blocks = dict(_blocks(metrics))
    if not blocks:
        return _Table([], [])
    constants = dict(_blocks(constant[1])) if constant is not None else {}
    columns = ["scores x 100", "pairs", *METRICS, *(["constant"] if constant is not None else [])]
    rows = []
    for name, block in blocks.items():
        row = [name, str(block.get("pairs", "")), *(_times_100(block.get(metric)) for metric in METRICS)]
        rows.append(row + ([_times_100(constants.get(name, {}).get("CIDEr"))] if constant is not None else []))
    notes = []
    if constant is not None:
        notes.append(f'constant: CIDEr of one caption for every pair, "{constant[0]}"')
    for key, text in (("METEOR_reason", "METEOR -: "), ("tokenizer_reason", "tokenised without Java: ")):
        reasons = dict.fromkeys(str(block[key]) for block in blocks.values() if block.get(key))
        notes += [text + reason for reason in reasons]
    return _Table(columns, rows, notes)


def _blocks(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "CIDEr" in metrics:
        yield "overall", metrics
    for key, name in _SUBSETS.items():
        if isinstance(metrics.get(key), Mapping):
            yield name, metrics[key]
    if isinstance(metrics.get("types"), Mapping):
        yield from ((f"  {kind}", block) for kind, block in metrics["types"].items() if isinstance(block, Mapping))


def other_values(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value as text) of what is no caption score in ``metrics``, nested names as "a / b"."""
    for name, value in metrics.items():
        if not prefix and (name in _SUBSETS or name in METRICS or name in ("types", "pairs", "tokenizer") or name.endswith("_reason")):
            continue
        if isinstance(value, Mapping):
            yield from other_values(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _times_100(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
