"""`python -m bench.fp8 [--smoke]`: may training use FP8 products? Five seeds in bf16 and the same five in FP8, judged by R@1 and CIDEr.

A mini CLEVR-Change is rendered, and each seed trains the preset `tiny` twice through both stages: adaptation, whose score is text-to-pair R@1
on the test split, then captioning from there, whose score is CIDEr. Both kinds share seeds, so their runs begin alike and read the same batches.

The gate: the mean of the FP8 runs lies in the 95% interval of the bf16 mean (Student's t), for both scores; above it is no loss and passes. It is
stricter than a test would be, for the mean of five other bf16 seeds falls below that interval, too, one time in sixteen: where it is
red, look at the paired difference, printed beside it, and give more seeds. Every product that can runs in FP8, however small.

In full it trains for 10 x 850 steps. Guessed, not measured: a quarter of an hour on a Hopper, hours on a CPU. Exit code: 0 where FP8 may be used,
1 where not, 2 where something was refused.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import machine
from bench.arguments import Parser, answered
from fastidc.config import Preset, Recipe, preset
from fastidc.data.images import ImageStore
from fastidc.data.records import all_captions, load_records
from fastidc.data.render import RenderConfig, render_dataset
from fastidc.demo import WORLD
from fastidc.errors import FastidcError
from fastidc.files import write_text
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import vocabulary_of
from fastidc.train.distributed import ALONE
from fastidc.train.engine import fit
from fastidc.train.fp8 import enable_fp8, refusals
from fastidc.train.optim import Stage
from fastidc.train.precision import Precision
from fastidc.train.session import Session

SCORES = ("R@1", "CIDEr")  # percent, and raw (not times 100)
KINDS = ("bf16", "fp8")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's, by degrees of freedom
SMOKE = {"scenes": 20, "width": 72, "height": 48, "image_size": 48, "batch": 4, "steps": (2, 2), "seeds": 2}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found of one score: the bf16 mean with its 95% interval, the FP8 mean, and their difference by seed with its own."""

    score: str
    seeds: int
    bf16: float
    low: float
    high: float
    fp8: float
    difference: float
    difference_low: float
    difference_high: float

    @property
    def verdict(self) -> str:
        return "inside" if self.low <= self.fp8 <= self.high else "above" if self.fp8 > self.high else "below"

    @property
    def passed(self) -> bool:
        return self.verdict != "below"

    def line(self) -> str:
        place = f"{self.verdict} the interval" if self.verdict == "inside" else f"{self.verdict} it"
        return (
            f"  {self.score:<6} bf16 {self.bf16:.4g} ({self.low:.4g} to {self.high:.4g}, {self.seeds} seeds)  fp8 {self.fp8:.4g}, {place}"
            f"  paired difference {self.difference:+.3g} ({self.difference_low:+.3g} to {self.difference_high:+.3g})"
        )


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of 2 to 10 values and the ends of its 95% interval."""
    if len(values) - 1 not in T_975:
        raise FastidcError(f"an interval needs 2 to {max(T_975) + 1} seeds, got {len(values)}.")
    if not all(map(math.isfinite, values)):
        raise FastidcError("a score is not finite, so nothing can be said of any.")
    mean = statistics.fmean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def judge(score: str, bf16: Sequence[float], fp8: Sequence[float]) -> Answer:
    """One score of the same seeds in both."""
    if len(bf16) != len(fp8):
        raise FastidcError(f"{score}: {len(bf16)} runs in bf16 and {len(fp8)} in FP8; each seed has one of both.")
    own, difference = interval(bf16), interval([b - a for a, b in zip(bf16, fp8, strict=True)])
    return Answer(score, len(bf16), *own, statistics.fmean(fp8), *difference)


# ---- runs


class Gate:
    """The data, the shape and the recipes that all runs share, and the bar that shows them."""

    def __init__(self, data: Path, chosen: Preset, device: torch.device, steps: tuple[int, int], workers: int, bar: tqdm):
        self.records = load_records(data)
        self.device, self.workers, self.bar, self.recipes = device, workers, bar, {}
        ids = vocabulary_of(all_captions(self.records["train"]))
        self.config = chosen.model.replace(vocabulary=ids, vocab_size=len(ids))
        self.images = ImageStore(self.config.image_size)
        for stage, count in zip(("adapt", "finetune"), steps, strict=True):
            self.recipes[stage] = dataclasses.replace(getattr(chosen, stage), steps=count, select="last")

    def run(self, seed: int, kind: str) -> dict[str, float]:
        """{score: value} of both stages."""
        torch.manual_seed(seed)
        adapted = CLIP4IDC.from_pretrained(self.config, captioner_layers=0)
        scores = {"R@1": self._stage("adapt", adapted, seed, kind)}
        torch.manual_seed(seed)  # the captioner's first weights are the same in both kinds
        model = CLIP4IDC(self.config)
        model.load_weights(dict(adapted.named_parameters()), "the adapted model", fresh=("captioner.",))
        scores["CIDEr"] = self._stage("finetune", model, seed, kind)
        return scores

    def _stage(self, stage: Stage, model: CLIP4IDC, seed: int, kind: str) -> float:
        recipe: Recipe = dataclasses.replace(self.recipes[stage], seed=seed)
        precision = Precision("bf16", self.device.type)
        session = Session(
            stage, recipe, model, self.records["train"], self.images, ALONE, self.device, precision, self.workers, compiling="off"
        )
        if kind == "fp8":
            enable_fp8(session.model, everything=True)
        self.bar.set_description(f"{kind} seed {seed} {stage}")
        fit(
            session.trainer,
            session.loader,
            recipe,
            total_steps=session.total_steps,
            on_step=lambda step: self.bar.update(),
            on_epoch=lambda epoch: False,
        )
        return session.judge.score(self.records["test"])[0]


def world(folder: Path, changes: Mapping[str, int]) -> Path:
    """Renders the demo's world with ``changes`` into ``folder``, or takes it from there."""
    config = RenderConfig(seed=0, **{**WORLD, **changes})
    known = folder / "render.json"
    if not known.is_file():
        render_dataset(config, folder)
    elif json.loads(known.read_text(encoding="utf-8")).get("config") != dataclasses.asdict(config):
        raise FastidcError(f"{folder}: holds another world than this gate's; give another --out, or delete this folder.")
    return folder


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m bench.fp8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smoke", action="store_true", help="a few scenes, seeds and steps, to see that it runs; the scores mean nothing")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--seeds", type=int, help="seeds 0, 1, ... of each kind, 2 to 10; 5 by default")
    p.add_argument("--steps", type=int, nargs=2, metavar=("ADAPT", "FINETUNE"), help="instead of the preset's 250 and 600")
    p.add_argument("--scenes", type=int, help=f"instead of {WORLD['scenes']}")
    p.add_argument("--optimizer", choices=("muon", "adamw", "bert_adam"), help="instead of the preset's muon")
    p.add_argument("--workers", type=int, default=4, help="threads that decode images")
    p.add_argument("--out", type=Path, default=Path("runs/fp8"), help="gets data/, runs.csv and verdict.csv; runs/fp8 by default")
    return p.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise FastidcError("there is no CUDA device here; give --device cpu.")
    device = torch.device("cuda" if cuda else "cpu")
    if refused := refusals(device, "bf16", on_cpu=True):
        raise FastidcError(" ".join(refused))
    chosen, changes = preset("tiny"), {}
    if options.smoke:
        changes = {name: SMOKE[name] for name in ("scenes", "width", "height")}
    if options.scenes is not None:
        changes["scenes"] = options.scenes
    seeds = options.seeds if options.seeds is not None else SMOKE["seeds"] if options.smoke else 5
    interval([0.0] * seeds)  # refuses a number of seeds that it has no factor for
    steps = tuple(options.steps or (SMOKE["steps"] if options.smoke else (chosen.adapt.steps, chosen.finetune.steps)))
    if min(steps) < 1:
        raise FastidcError(f"--steps must be at least 1, got {min(steps)}.")
    recipe = {"optimizer": options.optimizer} if options.optimizer is not None else {}
    if options.smoke:
        recipe["batch_size"] = SMOKE["batch"]
        chosen = dataclasses.replace(chosen, model=chosen.model.replace(image_size=SMOKE["image_size"]))
    chosen = dataclasses.replace(
        chosen, **{stage: dataclasses.replace(getattr(chosen, stage), **recipe) for stage in ("adapt", "finetune")}
    )
    facts = machine.facts(device.type)
    print(f"{facts['device']}, commit {facts['commit']}, torch {facts['torch']}, {facts['date']}")
    if options.smoke:
        print("smoke: a few scenes and steps; the scores mean nothing, and so does the verdict.")
    data = world(options.out / "data", changes)
    rows: list[dict] = []
    with tqdm(total=len(KINDS) * seeds * sum(steps), unit="step", smoothing=0.05) as bar:
        gate = Gate(data, chosen, device, steps, options.workers, bar)
        for seed in range(seeds):
            for kind in KINDS:
                rows.append({"kind": kind, "seed": seed, **gate.run(seed, kind), **facts})
                write_csv(options.out / "runs.csv", rows)  # after every run: what is known is on disk, however it ends
                tqdm.write(f"  {kind} seed {seed}: " + ", ".join(f"{name} {rows[-1][name]:.4g}" for name in SCORES))
    answers = [judge(name, *([row[name] for row in rows if row["kind"] == kind] for kind in KINDS)) for name in SCORES]
    write_csv(options.out / "verdict.csv", [dataclasses.asdict(a) | {"verdict": a.verdict, **facts} for a in answers])
    print("\n".join(answer.line() for answer in answers))
    passed = all(answer.passed for answer in answers)
    print("FP8 may be used: no score lies below bf16's interval." if passed else "FP8 may not be used: a score lies below bf16's interval.")
    return 0 if passed else 1


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, out.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    return answered("bench.fp8", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
