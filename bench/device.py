"""`python -m bench.device --out DIR --minutes 9`: everything that only a GPU can answer, the most valuable first (`bench.plan`).

Each part is a process with a time box of its own, and what it finds is in DIR as soon as it is known: whatever ends this call leaves all
cases that were finished. Another call with the same DIR, or with ``--resume`` and a copy of it, does what is missing. At most six files:
machine.json (also the parts' states), tests.txt, rows.csv, aot.json, log.txt, summary.md. Needs torch and this checkout, no more: what is
missing is a row that says so.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import plan, table
from bench.arguments import Parser, answered
from bench.case import LOST, OK
from bench.plan import Part
from fastidc.errors import FastidcError
from fastidc.files import write_json, write_text

ROOT = Path(__file__).parents[1]
FILES = ("machine.json", "tests.txt", "rows.csv", "aot.json", "log.txt", "summary.md")
GRACE = 15  # seconds that an interrupted part gets to end by itself
LOOK = 2.0  # seconds between two looks at what a running part has written
AGAIN = 3  # times that a part is begun again after a variant has left the device unusable
DONE = "done"


class Session:
    """What was found so far, and the files that say it."""

    def __init__(self, out: Path, minutes: float, cpu: bool):
        self.out, self.cpu = out, cpu
        self.deadline = time.monotonic() + 60 * minutes
        self.facts: dict = json.loads((out / "machine.json").read_text()) if (out / "machine.json").is_file() else {}
        self.done: dict[str, str] = self.facts.pop("parts", {})
        self.rows = _read(out / "rows.csv") if (out / "rows.csv").is_file() else []

    def run(self, part: Part, later: Sequence[Part] = (), asked: bool = False) -> None:
        """Runs a part within its box and takes up what it left. One that was done in an earlier call is run only where it was ``asked`` for."""
        if self.done.get(part.name, "").startswith(DONE) and not (asked or part.always):
            return
        left = self.deadline - time.monotonic()
        if left < part.least:
            self.done.setdefault(part.name, f"not begun: {left:.0f} s were left; run it with --parts {part.name}.")
            return self.write()
        box = plan.box(part, later, left)
        print(f"{part.name}: at most {box:.0f} s of {left:.0f}", flush=True)
        self.done[part.name] = "begun, and the call ended before it did"
        self.write()
        started = time.monotonic()
        for _ in range(1 + AGAIN):
            before = self._lost()
            code, output = self._once(part, box - (time.monotonic() - started))
            # what broke the device is in rows.csv now, so that the next try leaves it out
            if not self._lost() - before or time.monotonic() - started > box - part.least / 2:
                break
        seconds = time.monotonic() - started
        if part.name == "machine":
            found = next((line for line in output.splitlines() if line.startswith("MACHINE ")), None)
            self.facts = json.loads(found.removeprefix("MACHINE ")) if found else self.facts
        if part.name.endswith("tests"):
            earlier = self.out / "tests.txt"
            write_text(earlier, (earlier.read_text() if earlier.is_file() else "") + output)
        self.done[part.name] = f"{_state(part, code, output)} ({seconds:.0f} s)"
        self.write()

    def _lost(self) -> set[tuple[str, str, str]]:
        return {(row["family"], row["case"], row["variant"]) for row in self.rows if row["status"] == LOST}

    def _once(self, part: Part, seconds: float) -> tuple[int | None, str]:
        """One process of ``part``; its rows are in rows.csv while it runs and however it ends."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            more = ("--csv", name, "--done", str(self.out / "rows.csv")) if part.rows else ()
            if part.name == "aot":
                more = ("--json", str(self.out / "aot.json"))
            try:
                return self._process(part.name, (*part.command, *more), seconds, lambda: self._take(folder))
            finally:
                self._take(folder)

    def _process(self, name: str, command: Sequence[str], seconds: float, look: Callable[[], None]) -> tuple[int | None, str]:
        """Exit code (None where the box ended it) and what was printed, which is in log.txt as it comes. Ends the whole group: a family may
        have children."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
        environment["PYTHONUNBUFFERED"] = "1"
        if "bench.aot" in command or not self.cpu:
            environment.pop("TRITON_INTERPRET", None)
        with (self.out / "log.txt").open("a+b") as log:
            log.write(f"\n===== {name}\n".encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            code, end = None, time.monotonic() + seconds
            try:
                while code is None and time.monotonic() < end:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(timeout=max(0.0, min(LOOK, end - time.monotonic())))
                    look()
            finally:  # also where this call is being ended itself
                if code is None:
                    _end(process)
            log.seek(start)
            return code, log.read().decode(errors="replace")

    def _take(self, folder: Path) -> None:
        """Takes up the rows in ``folder``; a case that was run again replaces what it said before."""
        fresh = [row for path in sorted(folder.rglob("*.csv")) for row in _read(path)]
        again = {(row["family"], row["case"]) for row in fresh}
        rows = [row for row in self.rows if (row["family"], row["case"]) not in again] + fresh
        if rows != self.rows:
            self.rows = rows
            self.write()

    def write(self) -> None:
        """machine.json, rows.csv and summary.md, each whole."""
        write_json(self.out / "machine.json", {**self.facts, "parts": self.done})
        if self.rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, table.COLUMNS, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.out / "rows.csv", text.getvalue())
        write_text(self.out / "summary.md", self._summary())

    def _summary(self) -> str:
        lines = ["# bench.device", "", *(f"{name}: {value}  " for name, value in self.facts.items()), ""]
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


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _end(process: subprocess.Popen) -> None:
    for end in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
            return


def _state(part: Part, code: int | None, output: str) -> str:
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")[:200]
    if code is None:
        return "cut off by its time box, with what it had finished"
    if part.name.endswith("tests") and code in (0, 5):
        return f"{DONE}: {last if code == 0 else 'there are no tests that need a GPU here'}"
    return DONE if code == 0 else f"exit {code}: {last}"


def main(argv: Sequence[str] | None = None) -> int:
    # What ends this call from outside has to reach the part that runs: its process is of a session of its own.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return answered("bench.device", lambda: _run(_parse(argv)))
    except KeyboardInterrupt:
        print("bench.device: interrupted; cases that were finished are written.", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m bench.device", description="Everything that only a GPU can answer, within the minutes given.")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--resume", metavar="DIR", type=Path, help="what an earlier call left, to go on from; copied into --out")
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument("--parts", help="only these, by comma, in this order; their cases that are answered are not run again")
    p.add_argument("--rehearse", action="store_true", help="without a GPU: every part on tiny shapes, to see that it runs")
    return p.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() and not args.rehearse:
        raise FastidcError("there is no CUDA device here; give --rehearse to see that every part runs.")
    known = {part.name: part for part in plan.parts(args.rehearse)}
    names = list(known) if args.parts is None else [name.strip() for name in args.parts.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise FastidcError(f"unknown part {unknown[0]!r}; choose among {', '.join(known)}.")
    if not 0 < args.minutes < float("inf"):
        raise FastidcError(f"--minutes must be positive, got {args.minutes}.")
    _open(args.out, args.resume)
    session = Session(args.out, args.minutes, args.rehearse)
    for i, name in enumerate(names):
        session.run(known[name], [known[other] for other in names[i + 1 :]], asked=args.parts is not None)
        print(f"{name}: {session.done[name]}", flush=True)
    return 0


def _open(out: Path, resume: Path | None) -> None:
    """Makes ``out``, with the files of ``resume`` in it."""
    if resume is not None and not (resume / "machine.json").is_file():
        raise FastidcError(f"{resume}: no machine.json, so no earlier call of bench.device ended there; leave out --resume.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resume is not None and resume.resolve() != out.resolve():
            if taken := [name for name in FILES if (out / name).exists()]:
                raise FastidcError(f"{out}: has a {taken[0]} already; give --resume with an empty --out, or --out alone to go on there.")
            for name in FILES:
                if (resume / name).is_file():
                    shutil.copyfile(resume / name, out / name)
    except OSError as error:
        raise FastidcError(f"{out}: cannot be written ({error.strerror or error}); choose another --out.") from None


if __name__ == "__main__":
    sys.exit(main())
