"""How a run learnt, from its ``log.jsonl``: charts drawn as SVG in the page's own colours."""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError
from fastidc.files import parse_json

LOG_FILE, SCORES_FILE = "log.jsonl", "scores.jsonl"
_POINTS = 240  # of a line: more than its pixels would tell nothing
_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26


@dataclass(frozen=True)
class Line:
    """name: as the legend has it. x, y: as many numbers. faint: behind the others, without a legend of its own. dots: points as such."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, an empty list where there is none; a last line that a kill cut short is left out. FastidcError names a line
    that is no JSON object, and a file that cannot be read."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastidcError(f"{path}: cannot be read ({error}); delete it to have a report without it.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise FastidcError(f"{path}: line {number} is no JSON object; delete the line, or the file to have a report without it.")
    return rows


def charts(log: Sequence[dict[str, Any]], folder: Path, selected: dict[str, Any] | None) -> list[Chart]:
    """Loss, learning rates, gradient norm and validation scores of a run folder; those that it has rows for.

    log: the rows of its ``log.jsonl``. selected: what ``metrics.json`` says of the epoch that was kept. Scores of every epoch are in ``scores.jsonl`` where the run wrote it
    ({"epoch" from 0, "criterion", "score"}); else that epoch's is the only one.
    """
    steps = [row for row in log if isinstance(row.get("step"), int)]
    found = []
    x, loss = _column(steps, "loss")
    if x:
        smooth = Line("loss, running mean", *_binned(x, _smoothed(loss)))
        found.append(chart("loss", [Line("each step", *_binned(x, loss), faint=True), smooth], steps=True))
    rates = [(row["step"], row["lr"]) for row in steps if _numbers(row.get("lr"))]
    if rates:
        groups = list(dict.fromkeys(zip(*(values for _, values in rates), strict=False)))  # groups of one rate are one line
        names = ["learning rate"] if len(groups) == 1 else [f"group {i}" for i in range(1, len(groups) + 1)]
        at = [step for step, _ in rates]
        found.append(chart("learning rate", [Line(name, *_binned(at, y)) for name, y in zip(names, groups, strict=True)], steps=True))
    x, norm = _column(steps, "grad_norm")
    if x:
        smooth = Line("gradient norm, running mean", *_binned(x, _smoothed(norm)))
        log = min(norm) > 0 and max(norm) > 30 * min(norm)
        found.append(chart("gradient norm", [Line("each step", *_binned(x, norm), faint=True), smooth], log=log, steps=True))
    if scores := _scores(folder, selected):
        found.append(scores)
    return found


def _scores(folder: Path, selected: dict[str, Any] | None) -> Chart | None:
    wanted = ("epoch", "score")
    rows = [row for row in read_rows(folder / SCORES_FILE) if all(_number(row.get(name)) for name in wanted)]
    if not rows and selected and all(_number(selected.get(name)) for name in wanted):
        rows = [selected]
    if not rows:
        return None
    epochs, values = [row["epoch"] + 1 for row in rows], [row["score"] for row in rows]
    name = f"{rows[0].get('split', 'val')} {rows[0].get('criterion', 'score')}"
    lines = [Line(name, epochs, values, dots=True)]
    if selected and len(rows) > 1 and _number(selected.get("epoch")) and _number(selected.get("score")):
        lines.append(Line(f"kept: epoch {selected['epoch'] + 1}", [selected["epoch"] + 1], [selected["score"]], dots=True))
    title = name if len(rows) > 1 else f"{name}, epoch {epochs[0]}, which was kept"
    return chart(title, lines, axis="epoch")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))


def _column(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if _number(row.get(name))]  # a step that was left out has none
    return [row["step"] for row in kept], [row[name] for row in kept]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a fortieth of the run behind each step."""
    window, total, out = max(1, len(values) // 40), 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _binned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `_POINTS` points: the mean of each of even parts, at its last step."""
    count = len(x)
    edges = [count * i // min(count, _POINTS) for i in range(min(count, _POINTS) + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return [x[part][-1] for part in parts], [sum(y[part]) / len(y[part]) for part in parts]


def chart(title: str, lines: Sequence[Line], *, log: bool = False, axis: str = "step", steps: bool = False) -> Chart:
    """SVG of ``lines``; log: the upright axis is logarithmic, for numbers above 0. steps: the level axis begins at 0."""
    every_x = [v for line in lines for v in line.x]
    every_y = [math.log10(v) if log else v for line in lines for v in line.y]
    x_ticks = _ticks(0 if steps else min(every_x), max(every_x), whole=True)
    y_ticks = (
        [float(v) for v in range(math.floor(min(every_y)), math.ceil(max(every_y)) + 1)] if log else _ticks(min(every_y), max(every_y))
    )
    x0, x1 = (0 if steps else min(every_x)), max(every_x)
    if x0 == x1:
        x0, x1 = x_ticks[0], x_ticks[-1]
    x_ticks = [tick for tick in x_ticks if x0 <= tick <= x1]
    y0, y1 = min(y_ticks[0], *every_y), max(y_ticks[-1], *every_y)

    def px(v: float) -> float:
        return _LEFT + (v - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def py(v: float) -> float:
        return _HEIGHT - _BOTTOM - ((math.log10(v) if log else v) - y0) / ((y1 - y0) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" ']
    parts.append(f'aria-label="{html.escape(title)}"><title>{html.escape(title)}</title>')
    for tick in y_ticks:
        value = 10**tick if log else tick
        parts.append(f'<path class="grid" d="M{_LEFT} {py(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{py(value) + 3.5:.1f}" text-anchor="end">{_text(value)}</text>')
    for tick in x_ticks:
        anchor = "end" if px(tick) > _WIDTH - 20 else "middle"
        parts.append(f'<text class="tick" x="{px(tick):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{_text(tick)}</text>')
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 1}" text-anchor="end">{html.escape(axis)}</text>')
    shown = [line for line in lines if not line.faint]
    for line in lines:
        kind = "faint" if line.faint else f"line c{shown.index(line) % 4}"
        points = list(zip(map(px, line.x), map(py, line.y), strict=True))
        if len(points) > 1:
            parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        if line.dots or len(points) == 1:
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    for place, line in enumerate(shown if len(shown) > 1 else []):
        y = _TOP + 12 + 14 * place
        parts.append(f'<path class="line c{place % 4}" d="M{_WIDTH - 130} {y - 4}h16"/>')
        parts.append(f'<text class="tick" x="{_WIDTH - 108}" y="{y}">{html.escape(line.name)}</text>')
    return Chart(title, "".join([*parts, "</svg>"]))


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round numbers that span low to high."""
    if high <= low:
        low, high = low - abs(low) * 0.1 - (1 if low == 0 or whole else 0), high + abs(high) * 0.1 + (1 if high == 0 or whole else 0)
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _text(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.2g}"
