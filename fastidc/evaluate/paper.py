"""Our scores in the layout of the paper's tables (arXiv 2206.00629), above the paper's own numbers.

A published row helps only beside what it was measured on, so every table that has one says so below itself, and the caption table of
CLEVR-Change also says how far the official code's own seeds lie apart. Figures: ``clip4idc.md`` 10.5.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastidc.errors import FastidcError

KS = (1, 5, 10, 20, 50)  # every cut-off of the paper: what `retrieval_metrics` needs for any of the tables
CAPTION_COLUMNS = ("BLEU-4", "METEOR", "CIDEr", "ROUGE-L")  # B M C R, as the paper orders them
TYPE_LETTERS = MappingProxyType({"C": "color", "T": "material", "M": "move", "A": "add", "D": "drop", "DI": "no_change"})
_LEGEND = "C color, T texture (our material), M move, A add, D drop, DI distractor (our no change); CIDEr of each subset alone."
_WIDTH = 105
_OURS = "fastidc"

SEED_NOISE = (
    "Seed noise: with 8 other seeds the official code itself gets a CLEVR-Change CIDEr of 131.2 to 149.2, mean 141.95 (its README), "
    "so a single run within that range proves nothing."
)
_LEGACY = 'The published numbers are the official code\'s, i.e. "legacy" ties: compare them with a row of that name only.'


@dataclass(frozen=True)
class Published:
    """The paper's CLIP4IDC rows of one data set, as printed (times 100, one decimal).

    ``captions``: B, M, C, R (`CAPTION_COLUMNS`). ``types``: CIDEr in the order of `TYPE_LETTERS`, or None. ``ks``: cut-offs of
    ``pair_to_text`` (IP->T) and ``text_to_pair`` (T->IP), recall in percent. ``*_table``: number of the source table in the paper, None
    where ``clip4idc.md`` gives the figures without it.
    """

    title: str
    captions: tuple[float, ...]
    types: tuple[float, ...] | None
    ks: tuple[int, ...]
    pair_to_text: tuple[float, ...]
    text_to_pair: tuple[float, ...]
    captions_table: int | None = None
    types_table: int | None = None
    retrieval_table: int | None = None


PAPER: Mapping[str, Published] = MappingProxyType(
    {
        "clevr": Published(
            title="CLEVR-Change",
            captions=(56.9, 38.4, 150.7, 76.4),  # Table 1, encoder fine-tuned, change and no-change pairs together
            types=(149.1, 135.3, 91.0, 132.4, 135.5, 133.4),  # Table 2
            ks=(1, 5, 10),
            pair_to_text=(46.4, 83.0, 86.6),  # Table 6, and the official README
            text_to_pair=(26.8, 58.7, 70.0),  # Table 6 and the README; Table 7 prints @5 as 58.6
            captions_table=1,
            types_table=2,
            retrieval_table=6,
        ),
        "spot": Published(
            title="Spot-the-Diff",
            captions=(11.6, 14.2, 47.4, 35.0),  # the table of this data set, and the official README
            types=None,
            ks=(10, 20, 50),
            pair_to_text=(3.7, 7.3, 16.8),
            text_to_pair=(6.2, 10.5, 20.0),
        ),
        "ier": Published(
            title="Image-Editing-Request",
            captions=(8.2, 14.6, 32.2, 40.4),  # the table of this data set; the official code has no loader for it
            types=None,
            ks=(1, 5, 10),
            pair_to_text=(17.1, 28.4, 33.8),
            text_to_pair=(17.3, 33.7, 41.9),
        ),
    }
)


def caption_table(dataset: str, scores: Mapping[str, Any]) -> str:
    """What `score_by_subset` returned, times 100, as the paper lays it out: text of at most 105 columns.

    "clevr": BLEU-4, METEOR, CIDEr, ROUGE-L of all pairs (Table 1), then CIDEr per type of change (Table 2). "spot", "ier": the first
    alone. Any other name: the first alone, without a row of the paper. What was not scored is "-"; for METEOR the reason follows.
    Raises FastidcError where ``scores`` have no "overall".
    """
    overall = scores.get("overall")
    if not isinstance(overall, Mapping):
        raise FastidcError('the scores have no "overall"; give what score_by_subset returned')
    paper = PAPER.get(dataset)
    rows = [["", *CAPTION_COLUMNS], [_OURS, *(_times_100(overall.get(column)) for column in CAPTION_COLUMNS)]]
    if paper is not None:
        rows.append(["paper", *_decimals(paper.captions)])
    lines = [_title(dataset, "captions, scores x 100", paper and paper.captions_table), *_aligned(rows)]
    notes = [_aside(overall, "METEOR_reason", "METEOR -: "), _aside(overall, "tokenizer_reason", "tokenised without Java: ")]
    if paper is not None and paper.types is not None:
        lines += ["", *_type_table(dataset, paper, scores)]
        kinds = [kind for kind in scores.get("types") or () if kind not in TYPE_LETTERS.values()]
        notes = [_LEGEND, f"Types without a column of the paper: {', '.join(kinds)}." if kinds else "", *notes]
    notes.append(_no_paper(dataset) if paper is None else _comparable(paper, overall.get("pairs"), "pairs"))
    if dataset == "clevr":
        notes.append(SEED_NOISE)
    return _text(lines, notes)


def retrieval_table(dataset: str, metrics: Mapping[str, Any]) -> str:
    """Recall of image pair -> text, then text -> image pair, in percent as the paper lays it out, and ours' median and mean rank.

    ``metrics``: what `retrieval_metrics` returned with ``ks=KS``, or name of the ties -> that, a row for each. Cut-offs 1, 5, 10;
    for "spot" 10, 20, 50. Names other than "clevr", "spot" and "ier" get no row of the paper. Text of at most 105 columns.
    Raises FastidcError where there are no metrics, or one lacks a direction or a cut-off.
    """
    runs = {str(metrics.get("ties", "")): metrics} if "text_to_pair" in metrics or "pair_to_text" in metrics else metrics
    if not runs:
        raise FastidcError("there are no retrieval metrics to print; give what retrieval_metrics returned, or {ties: that}")
    paper = PAPER.get(dataset)
    ks = KS[:3] if paper is None else paper.ks
    rows = [["", *2 * [*(f"@{k}" for k in ks), "MdR", "MnR"]]]
    for name, run in runs.items():
        cells = [cell for direction in ("pair_to_text", "text_to_pair") for cell in _direction(name, run, direction, ks)]
        rows.append([f"{_OURS}, {name}" if name else _OURS, *cells])
    if paper is not None:
        rows.append(["paper", *_decimals(paper.pair_to_text), "-", "-", *_decimals(paper.text_to_pair), "-", "-"])
    lines = _aligned(rows, {1: "IP->T", 1 + len(ks) + 2: "T->IP"})
    notes = ["IP->T: image pair to text. T->IP: text to image pair. MdR, MnR: median and mean rank, from 1."]
    queries = next(iter(runs.values()))["text_to_pair"].get("queries")
    notes += [_no_paper(dataset)] if paper is None else [_LEGACY, _comparable(paper, queries, "sentences")]
    return _text([_title(dataset, "retrieval, recall in %", paper and paper.retrieval_table), *lines], notes)


def _type_table(dataset: str, paper: Published, scores: Mapping[str, Any]) -> list[str]:
    blocks = {**(scores.get("types") or {}), "no_change": scores.get("no_change")}
    ours = [_times_100((blocks.get(kind) or {}).get("CIDEr")) for kind in TYPE_LETTERS.values()]
    rows = [["", *TYPE_LETTERS], [_OURS, *ours], ["paper", *_decimals(paper.types or ())]]
    return [_title(dataset, "captions by type of change, CIDEr x 100", paper.types_table), *_aligned(rows)]


def _direction(name: str, run: Any, direction: str, ks: Sequence[int]) -> list[str]:
    values = run.get(direction) if isinstance(run, Mapping) else None
    if not isinstance(values, Mapping):
        raise FastidcError(f"metrics {name!r} have no {direction!r}; give what retrieval_metrics returned")
    for k in ks:
        if f"R@{k}" not in values:
            raise FastidcError(f"metrics {name!r} have no R@{k} of {direction!r}; call retrieval_metrics with ks={KS}")
    return [f"{values[key]:.1f}" for key in (*(f"R@{k}" for k in ks), "MdR", "MnR")]


def _title(dataset: str, what: str, table: int | None) -> str:
    name = PAPER[dataset].title if dataset in PAPER else dataset
    return f"{name}: {what}" + (f" (as the paper's Table {table})" if table else "")


def _comparable(paper: Published, count: int | None, unit: str) -> str:
    ours = "those scored here" if count is None else f"the {count} {unit} scored here"
    return (
        f"Not comparable unless the data and the weights are the same: the paper's rows are of the real data set ({paper.title}, its "
        f"whole test split) with CLIP ViT-B/32 weights, and the official code chooses its epoch on that split; {_OURS}'s are of {ours}."
    )


def _no_paper(dataset: str) -> str:
    return f"The paper has no numbers for {dataset!r}."


def _aside(scores: Mapping[str, Any], key: str, text: str) -> str:
    return text + str(scores[key]) if scores.get(key) else ""


def _times_100(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _decimals(values: Sequence[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]


def _aligned(rows: Sequence[Sequence[str]], groups: Mapping[int, str] | None = None) -> list[str]:
    """Lines of ``rows``, the first of which is the head, with a rule below it. ``groups``: a name above the columns from that index."""
    groups = groups or {}
    widths = [max(map(len, column)) for column in zip(*rows)]
    starts = [0]
    for index in range(1, len(widths)):
        starts.append(starts[-1] + widths[index - 1] + (5 if index in groups else 2))
    lines = []
    for row in rows:
        line = row[0]
        for cell, start, width in zip(row[1:], starts[1:], widths[1:]):
            line = line.ljust(start) + cell.rjust(width)
        lines.append(line)
    lines.insert(1, "-" * len(lines[0]))
    if groups:
        head = ""
        for index, name in groups.items():
            head = head.ljust(starts[index]) + name
        lines.insert(0, head)
    return lines


def _text(lines: Sequence[str], notes: Sequence[str]) -> str:
    wrapped = [line for note in notes if note for line in textwrap.wrap(note, _WIDTH, break_on_hyphens=False)]
    return "\n".join([*lines, "", *wrapped])
