"""`python -m bench.saving [--smoke]`: how long does a snapshot hold up training?

Steps of captioning ViT-B/32, whose snapshots are the largest, in laps: in every second lap a snapshot is begun before the first step and written to a
disk while the steps go on, until it is there. The other laps have as many steps and no snapshot. What a lap with one takes longer is the stall: the
copy that training waits for, and what the writer takes from the steps beside it (checksums, on a CPU also the cores). At the default interval,
`fastidc.safety.Safety.save_every_minutes`, it may be 5% of the time.

Exit code: 0 where it is, 1 where it is not, 2 where something was refused.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import machine
from bench.arguments import Parser, answered
from bench.cases import B32, TINY
from bench.families import steps
from bench.fp8 import write_csv
from fastidc.errors import FastidcError
from fastidc.safety import Safety
from fastidc.train import progress
from fastidc.train.distributed import ALONE
from fastidc.train.snapshot import Writer

LIMIT = 0.05  # of the time, at the default interval
LEAST = 4  # steps of a lap
BATCH = {"cuda": 256, "cpu": 4}


@dataclass(frozen=True)
class Lap:
    """A lap with a snapshot, and one without of as many steps; seconds."""

    steps: int
    copied: float  # before the first step
    written: float  # beside the steps, until the snapshot was on the disk
    stall: float  # what the first lap took longer than the second


def laps(step: Callable[[], object], session: SimpleNamespace, writer: Writer, count: int, synchronize: Callable[[], None]) -> list[Lap]:
    """``count`` laps of each kind, alternating."""

    def clock() -> float:
        synchronize()
        return time.perf_counter()

    found = []
    for number in range(count):
        begun = clock()
        writer.start(number, progress.captured(session), {})
        copied, done, written = clock(), 0, None
        while done < LEAST or written is None:
            step()
            done += 1
            if written is None and not writer.busy:
                written = clock()
        saved = clock()
        writer.wait()
        again = clock()
        for _ in range(done):
            step()
        plain = clock()
        found.append(Lap(done, copied - begun, written - copied, (saved - begun) - (plain - again)))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m bench.saving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smoke", action="store_true", help="a tiny model and two laps, to see that it runs")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--laps", type=int, help="of each kind; 5 by default")
    p.add_argument("--out", type=Path, help="the disk that is written to: a folder there; by default the temporary one")
    p.add_argument("--csv", type=Path, help="write the laps here")
    return p.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise FastidcError("there is no CUDA device here; give --device cpu.")
    count = options.laps if options.laps is not None else 2 if options.smoke else 5
    if count < 1:
        raise FastidcError(f"--laps must be at least 1, got {count}.")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    config, samples = (TINY, 2) if options.smoke else (B32, BATCH[device])
    facts = machine.facts(device)
    print(f"{facts['device']}, commit {facts['commit']}, torch {facts['torch']}, {facts['date']}")
    stepper = steps.build("fastidc", config, "finetune", device, dtype)
    batch = stepper.prepare(steps.batch_of(config, "finetune", samples))
    session = SimpleNamespace(world=ALONE, device=torch.device(device), model=stepper.model, optimizer=stepper.optimizer)
    for _ in range(2):  # moments are there after the first one
        stepper.step(batch)
    with tempfile.TemporaryDirectory(prefix="saving-", dir=options.out) as folder:
        writer = Writer(Path(folder), keep=1)
        found = laps(lambda: stepper.step(batch), session, writer, count, torch.cuda.synchronize if cuda else lambda: None)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        write_csv(
            options.csv, [{"case": "B/32 finetune" if not options.smoke else "tiny", "bytes": size, **vars(lap), **facts} for lap in found]
        )
    stall, interval = statistics.median(lap.stall for lap in found), 60 * Safety().save_every_minutes
    spread = f"{min(lap.stall for lap in found):.2f} to {max(lap.stall for lap in found):.2f}"
    print(
        f"{size / 1e9:.2f} GB a snapshot: {statistics.median(lap.copied for lap in found):.2f} s to copy, "
        f"{statistics.median(lap.written for lap in found):.2f} s to write beside {found[0].steps} steps; "
        f"stall {stall:.2f} s ({spread}), {stall / interval:.2%} of {interval / 60:g} minutes (limit {LIMIT:.0%})."
    )
    return 0 if stall <= LIMIT * interval else 1


def main(arguments: Sequence[str] | None = None) -> int:
    return answered("bench.saving", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
