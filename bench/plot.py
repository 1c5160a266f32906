"""`python -m bench.plot`: the committed rows as pictures: bars against peers with the floor as a line, scaling with batch, the waterfall.

Reads bench/results/<device>/*.csv, writes docs/bench-<device>-<what>.svg. The newest file of a family counts. Rows of a CPU have ratios and
no times, and their pictures say so.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.case import OK
from fastidc.errors import FastidcError

ROOT = Path(__file__).parents[1]
OURS, PEER, FLOOR = "#c1440e", "#8a9ba8", "#1d3557"
SHOWN_CASES = 6  # of a family: a picture is read, a table is searched
Rows = list[dict[str, str]]


def read(folder: Path) -> dict[str, Rows]:
    """{family: rows} of one device's folder, from each family's newest file; rows.csv of `bench.device` holds all of them."""
    rows: dict[str, Rows] = {}
    for path in sorted(folder.glob("*.csv"), key=_age):
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        if found and not {"family", "case", "variant", "mode", "status"} <= set(found[0]):
            raise FastidcError(f"{path}: not a file of bench rows; the columns family, case, variant, mode and status were expected.")
        for family in dict.fromkeys(row["family"] for row in found):
            rows[family] = [row for row in found if row["family"] == family]
    return rows


def _age(path: Path) -> tuple:
    """Oldest first: <date>-<family>.csv, with -2 and so on behind it where a family ran again that day; rows.csv has all of a device run."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)-(.+?)(?:-(\d+))?", path.stem)
    return (1, found[1], int(found[3] or 1)) if found else (0, path.stem, 0)


def bars(family: str, rows: Rows, title: str):
    """One panel a case: the median with p20 to p80, ours in colour, the floor as a line. On a CPU ratios, where longer is faster."""
    timed = [row for row in rows if row["status"] == OK and (row["ms"] or row["ratio"]) and row["mode"] in ("both", "step", "fwd", "bwd")]
    timed = [row for row in timed if row["mode"] != "fwd" or not any(o["case"] == row["case"] and o["mode"] == "both" for o in timed)]
    timed = [row for row in timed if row["mode"] != "bwd"]
    cases = list(dict.fromkeys(row["case"] for row in timed))[:SHOWN_CASES]
    if not cases:
        return None
    by_time = any(row["ms"] for row in timed)
    panels = []
    for case in cases:
        mine = [row for row in timed if row["case"] == case]
        if by_time:  # with several baselines a variant has a row for each of them, with the same time
            mine = list({row["variant"]: row for row in mine if row["ms"]}.values())
        else:
            baseline = next((row["baseline"] for row in mine if row["ratio"]), "")
            mine = [row for row in mine if row["baseline"] == baseline and row["ratio"]]
        if mine:
            panels.append((case, mine))
    plt = _pyplot()
    height = sum(0.34 * len(mine) + 0.9 for _, mine in panels) + 0.6
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.5, height), squeeze=False, height_ratios=[len(mine) + 2 for _, mine in panels])
    for ax, (case, mine) in zip(axes[:, 0], panels, strict=True):
        key = "ms" if by_time else "ratio"
        mine = sorted(mine, key=lambda row: float(row[key]), reverse=by_time)
        values = [float(row[key]) for row in mine]
        spread = [[abs(v - float(row[f"{key}_p20"])) for v, row in zip(values, mine, strict=True)]]
        spread += [[abs(float(row[f"{key}_p80"]) - v) for v, row in zip(values, mine, strict=True)]]
        colours = [OURS if row["ours"] == "True" else PEER for row in mine]
        ax.barh([row["variant"] for row in mine], values, xerr=spread, color=colours, error_kw={"lw": 0.8})
        floors = [float(row["ms"]) * float(row["percent_of_floor"]) / 100 for row in mine if by_time and row["percent_of_floor"]]
        if floors:
            ax.axvline(floors[0], color=FLOOR, lw=1.2)
            ax.text(floors[0], len(mine) - 0.4, " floor", color=FLOOR, fontsize=8, va="bottom")
        unit = f"ms, {mine[0]['mode']}" if by_time else f"times as fast as {mine[0]['baseline']}"
        ax.set_title(f"{case} ({unit})", fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def scaling(rows: Rows, title: str):
    """Rate against batch size, a line a variant, a panel a stage; None where no case has two batch sizes."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        found = re.fullmatch(r"(.*) [Bbn]=(\d+)(.*)", row["case"])
        if found and row["status"] == OK and row["rate"]:
            stage = (found[1] + found[3]).strip()
            points.setdefault(stage, {}).setdefault(row["variant"], []).append((int(found[2]), float(row["rate"])))
    points = {stage: lines for stage, lines in points.items() if any(len(set(line)) > 1 for line in lines.values())}
    if not points:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(points), figsize=(4.6 * len(points), 3.6), squeeze=False)
    ours = {row["variant"] for row in rows if row["ours"] == "True"}
    for ax, (stage, lines) in zip(axes[0], points.items(), strict=True):
        for i, (variant, line) in enumerate(lines.items()):
            line = sorted(set(line))
            style = {"color": OURS, "lw": 2} if variant in ours else {"color": PEER, "ls": ("-", "--", ":", "-.")[i % 4]}
            ax.plot([x for x, _ in line], [y for _, y in line], marker="o", ms=3, label=variant, **style)
        ax.set(xscale="log", yscale="log", xlabel="batch", ylabel=f"{rows[0]['unit'] or 'items'}/s")
        ax.set_title(stage, fontsize=9, loc="left")
        ax.legend(fontsize=7, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def waterfall(rows: Rows, title: str):
    """From the slowest variant of a whole step to the fastest, each with how many times as fast it is as the one before."""
    timed = [row for row in rows if row["status"] == OK and row["ms"]]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    if not cases:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(cases), figsize=(max(5, 2.6 * len(cases)), 3.8), squeeze=False)
    for ax, case in zip(axes[0], cases, strict=True):
        mine = sorted({row["variant"]: row for row in timed if row["case"] == case}.values(), key=lambda row: -float(row["ms"]))
        values = [float(row["ms"]) for row in mine]
        ax.bar(range(len(mine)), values, color=[OURS if row["ours"] == "True" else PEER for row in mine])
        for i, value in enumerate(values):
            ax.text(i, value, "" if not i else f"{values[i - 1] / value:.2f}x", ha="center", va="bottom", fontsize=8)
        ax.set_xticks(range(len(mine)), [row["variant"] for row in mine], rotation=35, ha="right", fontsize=7)
        ax.set_ylabel("ms a step")
        ax.set_title(case, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise FastidcError(f"pictures need matplotlib, which cannot be imported ({error}); pip install matplotlib.") from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "fastidc", "font.size": 9}  # the same rows give the same bytes
    import matplotlib.pyplot as plt

    return plt


def draw(results: Path, out: Path) -> list[Path]:
    """Every picture of every device under ``results``; returns what was written."""
    written: list[Path] = []
    folders = [path for path in sorted(results.iterdir()) if path.is_dir()] if results.is_dir() else []
    for folder in folders:
        for family, rows in read(folder).items():
            first = rows[0]
            facts = f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}"
            ratios = "" if any(row["ms"] for row in rows) else "; ratios within one run"
            figures = {family: bars(family, rows, f"{family}: {facts}{ratios}")}
            if family in ("train_step", "generate"):
                figures |= {f"{family}-scaling": scaling(rows, facts), f"{family}-waterfall": waterfall(rows, facts)}
            written += list(_save(figures, out, folder.name))
    return written


def _save(figures: dict, out: Path, device: str) -> Iterable[Path]:
    for name, figure in figures.items():
        if figure is not None:
            path = out / f"bench-{device}-{name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="svg", metadata={"Date": None})
            _pyplot().close(figure)
            yield path


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    p.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    p.add_argument("--out", type=Path, default=ROOT / "docs")
    args = p.parse_args(argv)
    try:
        written = draw(args.results, args.out)
        if not written:
            raise FastidcError(f"{args.results}: no rows to draw; `python -m bench FAMILY --csv {args.results}` writes some.")
    except FastidcError as error:
        print(f"bench.plot: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
