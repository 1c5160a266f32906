"""`python -m bench.device --out DIR --minutes 9`: everything that only a GPU can answer, the most valuable first.

Each part is a process with a time box of its own, and what it finds is in DIR as soon as it is known: an interrupted call leaves all that
was finished, and ``--parts`` does the rest in another call with the same DIR. At most six files: machine.json, tests.txt, rows.csv,
aot.json, log.txt, summary.md. Needs torch and this checkout, no more: what is missing is a row that says so.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import table
from bench.case import OK
from fastidc.errors import FastidcError
from fastidc.files import write_json, write_text

ROOT = Path(__file__).parents[1]
GRACE = 15  # seconds that an interrupted part gets to write its rows


@dataclasses.dataclass(frozen=True)
class Part:
    """One process. ``share``: of the minutes that are left when it starts, at most so much; ``least``: seconds below which it is not begun."""

    name: str
    command: tuple[str, ...]
    share: float
    least: int = 20
    rows: bool = True  # a bench family, which writes rows


def parts(cpu: bool) -> list[Part]:
    """In the order of their value. ``cpu`` is a rehearsal without a GPU, with tiny shapes."""
    flags = ("--smoke",) if cpu else ()

    def family(name: str, share: float, *more: str) -> Part:
        return Part(name, ("-m", "bench", name, *flags, *more), share)

    return [
        Part("machine", ("-c", _MACHINE), 0.2, rows=False),
        Part(
            "tests",
            ("-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider", "tests/test_gpu.py"),
            0.25,
            rows=False,
        ),
        family("train_step", 0.45),
        family("attention", 0.35),
        family("linear_cross_entropy", 0.3),
        family("info_nce", 0.3),
        family("generate", 0.4),
        family("optimizer", 0.4),
        family("layer_norm", 0.4),
        family("patches", 0.5),
        family("loader", 0.6),
        Part("aot", ("-m", "bench.aot", "--arch", "sm_90"), 0.9, rows=False),
    ]


# A process of its own, because a broken driver must not take the others with it.
_MACHINE = """
import importlib.metadata, json, platform, sys
import torch
from bench import machine, timing
out = {"python": sys.version.split()[0], "platform": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda}
for name in ("triton", "cupy-cuda12x", "cupy-cuda13x", "open_clip_torch", "xformers", "nvidia-dali-cuda130", "liger-kernel", "cut-cross-entropy", "pytest"):
    out[name] = machine.version(name)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    out |= {"device": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count, "capability": f"{p.major}.{p.minor}"}
    c = timing.ceilings()
    out |= {"copy_gbs": round(c.bytes / 1e9), "matmul_tflops": round(c.flops / 1e12, 1)}
else:
    out["device"] = "no CUDA device"
print("MACHINE " + json.dumps(out))
"""


class Session:
    """What was found so far, and the files that say it."""

    def __init__(self, out: Path, minutes: float, cpu: bool):
        self.out, self.cpu = out, cpu
        self.deadline = time.monotonic() + 60 * minutes
        self.done: dict[str, str] = {}
        self.rows: list[dict[str, str]] = []
        if (out / "rows.csv").is_file():
            with (out / "rows.csv").open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def run(self, part: Part) -> None:
        """Runs a part within its box and takes up what it left."""
        left = self.deadline - time.monotonic()
        if left < part.least:
            self.done[part.name] = f"not begun: {left:.0f} s were left; run it with --parts {part.name}."
            return self.write()
        box = max(part.least, left * part.share)
        print(f"{part.name}: at most {box:.0f} s of {left:.0f}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            more = ("--csv", folder) if part.rows else ("--json", str(self.out / "aot.json")) if part.name == "aot" else ()
            code, output = self._process((*part.command, *more), box)
            if part.rows:
                self._take_rows(part, Path(folder))
        seconds = time.monotonic() - started
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n===== {part.name} ({seconds:.0f} s, exit {code})\n{output}\n")
        if part.name == "machine":
            found = next((line for line in output.splitlines() if line.startswith("MACHINE ")), None)
            if found:
                write_json(self.out / "machine.json", json.loads(found.removeprefix("MACHINE ")))
        if part.name == "tests":
            write_text(self.out / "tests.txt", output)
        last = next((line for line in reversed(output.strip().splitlines()) if line.strip()), "")
        state = (
            "cut off by its time box, with what it had finished" if code is None else "done" if code == 0 else f"exit {code}: {last[:200]}"
        )
        if part.name == "tests" and code in (0, 5):
            state = last[:200] if code == 0 else "there are no tests that need a GPU here"
        self.done[part.name] = f"{state} ({seconds:.0f} s)"
        self.write()

    def _process(self, command: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Exit code (None where the box ended it) and what was printed. Ends the whole group: a family may have children."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
        if "bench.aot" in command or not self.cpu:
            environment.pop("TRITON_INTERPRET", None)
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
            )
            code: int | None = None
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                for end, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, end)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=patience)
                        break
            printed.seek(0)
            return code, printed.read()

    def _take_rows(self, part: Part, folder: Path) -> None:
        fresh: list[dict[str, str]] = []
        for path in sorted(folder.rglob("*.csv")):
            with path.open(newline="") as file:
                fresh += list(csv.DictReader(file))
        again = {(row["family"], row["case"]) for row in fresh}  # a case that is run again replaces what it said before
        self.rows = [row for row in self.rows if (row["family"], row["case"]) not in again] + fresh

    def write(self) -> None:
        """rows.csv and summary.md, whole after every part."""
        if self.rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, table.COLUMNS, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.out / "rows.csv", text.getvalue())
        write_text(self.out / "summary.md", self._summary())

    def _summary(self) -> str:
        lines = ["# bench.device", ""]
        machine = self.out / "machine.json"
        if machine.is_file():
            lines += [f"{name}: {value}  " for name, value in json.loads(machine.read_text()).items()] + [""]
        lines += ["| part | |", "|---|---|", *(f"| {name} | {state} |" for name, state in self.done.items()), ""]
        lines += ["| family | case | variant | | ms | % of floor | ratio |", "|---|---|---|---|---|---|---|"]
        for row in self.rows:
            if row["mode"] not in ("both", "step", "fwd"):
                continue
            ratio = f"{float(row['ratio']):.2f}x {row['baseline']}" if row["ratio"] else ""
            shown = row["status"] if row["status"] != OK else row["mode"]
            lines.append(
                f"| {row['family']} | {row['case']} | {row['variant']} | {shown} | {row['ms']} | {row['percent_of_floor']} | {ratio} |"
            )
        return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.device", description="Everything that only a GPU can answer, within the minutes given."
    )
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument("--parts", help="only these, by comma, in this order")
    p.add_argument("--rehearse", action="store_true", help="without a GPU: every part on tiny shapes, to see that it runs")
    args = p.parse_args(argv)
    try:
        return _run(args)
    except FastidcError as error:
        print(f"bench.device: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() and not args.rehearse:
        raise FastidcError("there is no CUDA device here; give --rehearse to see that every part runs.")
    known = {part.name: part for part in parts(args.rehearse)}
    names = list(known) if args.parts is None else [name.strip() for name in args.parts.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise FastidcError(f"unknown part {unknown[0]!r}; choose among {', '.join(known)}.")
    if not 0 < args.minutes < float("inf"):
        raise FastidcError(f"--minutes must be positive, got {args.minutes}.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastidcError(f"{args.out}: cannot be made ({error.strerror or error}); choose another --out.") from None
    session = Session(args.out, args.minutes, args.rehearse)
    for name in names:
        session.run(known[name])
        print(f"{name}: {session.done[name]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
