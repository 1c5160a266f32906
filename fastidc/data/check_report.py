"""What `fastidc check` prints."""

from collections.abc import Iterable
from typing import Any

from fastidc.data.check import Findings, Problem
from fastidc.data.datasets.base import SPLITS
from fastidc.data.datasets.flaws import LEVELS

_HEADS = ("level", "kind", "file", "place", "field")
_WIDEST = 32


def table(problems: Iterable[Problem], most: int = 0) -> str:
    """A line for each problem, the worst first: level, kind, file, index or line, field, what is wrong and what to do. ``most`` of them; 0: all."""
    problems = list(problems)
    rows = [[getattr(problem, head) for head in _HEADS] for problem in (problems[:most] if most else problems)]
    if not rows:
        return ""
    widths = [min(_WIDEST, max(len(row[i]) for row in (_HEADS, *rows))) for i in range(len(_HEADS))]
    lines = [_line(_HEADS, widths, "what is wrong; what to do")]
    lines += [_line(row, widths, _sentence(problem)) for row, problem in zip(rows, problems, strict=False)]
    if len(rows) < len(problems):
        lines.append(f"... and {len(problems) - len(rows):,} more: --limit 0 shows all, --json FILE writes all.")
    return "\n".join(lines)


def _line(cells: Iterable[str], widths: list[int], rest: str) -> str:
    return "  ".join([*(_printable(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)), _printable(rest)]).rstrip()


def _sentence(problem: Problem) -> str:
    return f"{problem.what}; {problem.fix}" if problem.fix else problem.what


def _printable(text: str) -> str:
    """On one line, and fit for any terminal."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def summary(found: Findings) -> str:
    """Counts of the whole set, of the problems, and the verdict."""
    facts, lines = found.facts, []
    if splits := facts.get("splits"):
        lines += _splits(splits) + _texts(facts)
    if images := facts.get("images"):
        lines.append(f"images: {images['files']:,} files, {images['bytes'] / 1e6:,.1f} MB{_looked(facts)}")
        lines += [f"  {name}: {_most(images[name])}" for name in ("sizes", "modes", "formats") if images[name]]
    for level, said in zip(LEVELS, ("fatal", "bad", "notes"), strict=True):
        if counts := found.count(level):
            lines.append(f"{said}: {counts.total():,} ({', '.join(f'{kind} {count:,}' for kind, count in counts.most_common())})")
    return "\n".join([*lines, verdict(found)])


def verdict(found: Findings) -> str:
    """One sentence."""
    if found.code == 2:
        return f"{found.root}: cannot be read until what is fatal above is mended."
    pairs = len(found.bad_pairs())
    if not pairs:
        return f"{found.root}: nothing is wrong with any pair."
    return f"{found.root}: {pairs:,} {'pair is' if pairs == 1 else 'pairs are'} bad; mend them, or leave them out: --quarantine FILE."


def _splits(splits: dict[str, dict[str, int]]) -> list[str]:
    names = ("pairs", "sentences", "empty", "no_change_sentences")
    if not any(splits[split]["no_change_sentences"] for split in SPLITS):
        names = names[:-1]
    rows = [["split", *(name.replace("_", " ") for name in names)]]
    rows += [[split, *(f"{splits[split][name]:,}" for name in names)] for split in SPLITS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]


def _texts(facts: dict[str, Any]) -> list[str]:
    lines = [f"words: {facts['vocabulary']['words']:,} different ones; the longest sentence has {facts['longest_words']}"]
    if "truncated" in facts:
        cut = ", ".join(f"{share:.2%} are cut off at {most}" for most, share in facts["truncated"].items())
        lines.append(f"tokens: {facts['vocabulary']['tokens']:,} different ones; of the sentences {cut}")
    else:
        lines.append(f"tokens: not counted: {facts['tokens_reason']}")
    return lines + ([f"types: {_most(facts['types'], 12)}"] if facts["types"] else [])


def _looked(facts: dict[str, Any]) -> str:
    how = {"full": "all decoded", "ends": "both ends read"}[facts["looked_at"]]
    return f", {how} in {facts['seconds']:,.1f} s"


def _most(counts: dict[str, int], most: int = 6) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:most])
    return shown + (f" and {len(counts) - most:,} more" if len(counts) > most else "")
