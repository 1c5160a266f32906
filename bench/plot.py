"""`python -m bench.plot`: the committed rows as pictures: bars against peers with the floor as a line, scaling with batch, the waterfall.

Reads bench/results/<device>/*.csv, writes docs/bench-<device>-<what>.svg. The newest file of a family counts. Rows of a CPU have ratios and
no times, and their pictures say so.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from bench import waterfall
from bench.arguments import Parser, answered
from bench.case import OK
from fastidc.errors import FastidcError

ROOT = Path(__file__).parents[1]
OURS, PEER, FLOOR = "#c1440e", "#8a9ba8", "#1d3557"
# A picture is read, a table is searched: of a family's cases only these, the paper's shapes at a size that fills a GPU, in this order; where
# there is none of them (a CPU, a part of the cases) the first ones.
SHOWN_CASES = 6
SHOWN = {
    "attention": tuple(
        f"{shape} *n=1024"
        for shape in (
            "intra B/32",
            "inter B/32",
            "text L=32",
            "text packed",
            "caption encoder",
            "caption cross",
            "inter B/16",
            "inter L/14",
        )
    ),
    "info_nce": tuple(f"B={batch} D=512" for batch in (128, 1024, 16384, 65536)),
    "linear_cross_entropy": tuple(f"{table} N={rows} *" for rows in (1792, 14336) for table in ("frozen", "trained")),
    "layer_norm": ("B/32 M=102400 *", "text M=14336 *", "L/14 M=526336 *"),
    "patches": ("*K=2048",),
    "train_step": ("B/32 adapt B=128", "B/32 adapt B=1024", "B/32 finetune B=16", "B/32 finetune B=256", "B/32 *B=max"),
    "generate": ("B/32 b=*",),
}
SCALED = {"attention": "inter B/32 *", "train_step": "*", "generate": "*"}  # family: cases whose rate is drawn against the batch
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
    timed = [row for row in timed if row["mode"] != "bwd" and not waterfall.is_rung(row["variant"])]
    cases = shown(family, timed)
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


def shown(family: str, rows: Rows) -> list[str]:
    """The names of the cases that a picture has room for."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    wanted = [name for pattern in SHOWN.get(family, ()) for name in names if fnmatchcase(name, pattern)]
    return wanted or names[:SHOWN_CASES]


def scaling(family: str, rows: Rows, title: str):
    """Rate against batch size, a line a variant, a panel a stage; None where no case has two batch sizes."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in (row for row in rows if not waterfall.is_rung(row["variant"])):
        found = re.fullmatch(r"(.*) [Bbn]=(\d+|max)(.*)", row["case"])
        if found and row["status"] == OK and row["rate"] and fnmatchcase(row["case"], SCALED[family]):
            stage = (found[1] + found[3]).strip()
            size = int(row["batch"] if found[2] == "max" else found[2])
            points.setdefault(stage, {}).setdefault(row["variant"], []).append((size, float(row["rate"])))
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


def steps_down(rows: Rows, title: str):
    """The waterfall: A, B, and fastidc feature by feature, always in this order, each with how many times as fast it is as the one before;
    the last is fastidc itself, under the name of its last feature. On a CPU in units of A's time."""
    timed, unit = _times(rows)
    with_features = [row["case"] for row in timed if row["variant"] == waterfall.PLAIN]
    cases = list(dict.fromkeys(with_features)) or shown(rows[0]["family"], timed)
    if not cases:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(cases), figsize=(max(5, 2.6 * len(cases)), 3.8), squeeze=False)
    for ax, case in zip(axes[0], cases, strict=True):
        named = {row["variant"]: row for row in timed if row["case"] == case}
        mine = [named[name] for name in waterfall.order(set(named))]
        values = [row["time"] for row in mine]
        ax.bar(range(len(mine)), values, color=[OURS if row["ours"] == "True" else PEER for row in mine])
        for i, value in enumerate(values):
            ax.text(i, value, "" if not i else f"{values[i - 1] / value:.2f}x", ha="center", va="bottom", fontsize=8)
        names = [row["variant"] for row in mine]
        if case in with_features and names[-1] == waterfall.OURS:
            half, device = mine[-1]["dtype"] == "bfloat16", "cuda" if mine[-1]["ms"] else "cpu"
            names[-1] = waterfall.last_feature("finetune" if " finetune " in case else "adapt", half, device)
        ax.set_xticks(range(len(mine)), names, rotation=35, ha="right", fontsize=7)
        ax.set_ylabel(unit)
        ax.set_title(case, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def _times(rows: Rows) -> tuple[Rows, str]:
    """Rows with a "time", and its unit: milliseconds, or on a CPU, whose rows are ratios, A's time."""
    fine = [row for row in rows if row["status"] == OK]
    if any(row["ms"] for row in fine):
        return [{**row, "time": float(row["ms"])} for row in fine if row["ms"]], "ms a step"
    baseline = waterfall.PEERS[0]
    found = [{**row, "time": 1 / float(row["ratio"])} for row in fine if row["ratio"] and row["baseline"] == baseline]
    cases = dict.fromkeys(row["case"] for row in found)
    theirs = [{**row, "time": 1.0} for row in fine if row["variant"] == baseline and row["case"] in cases]
    return [*({row["case"]: row for row in theirs}.values()), *found], f"time of a step, {baseline} = 1"


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
            if family in SCALED:
                figures[f"{family}-scaling"] = scaling(family, rows, f"{family}: {facts}")
            if family in ("train_step", "generate"):
                figures[f"{family}-waterfall"] = steps_down(rows, f"{family}: {facts}")
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
    return answered("bench.plot", lambda: run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m bench.plot", description=__doc__)
    p.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    p.add_argument("--out", type=Path, default=ROOT / "docs")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    written = draw(args.results, args.out)
    if not written:
        raise FastidcError(f"{args.results}: no rows to draw; `python -m bench FAMILY --csv {args.results}` writes some.")
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
