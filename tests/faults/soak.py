"""Steps for minutes in one process, with scores, log and snapshots: memory, open files and threads do not grow."""

import itertools
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

from tests.faults.tally import Tally
from tests.faults.toy import Toy, check_snapshots, shared

WARM_UP = 0.25  # of the time: allocators and caches fill
GROWTH = 0.01  # of resident memory, over the rest
_STALL = 60.0  # seconds


def watched(file: str, seconds: float) -> None:
    """Every half second a line of what this process holds, after a step; when the time is over it tells itself to end. Nothing stops it before."""
    import dataclasses

    from fastidc.train import run
    from fastidc.train.stage import StageRun

    on_step, resolve, begun, last = StageRun.on_step, run.resolve, time.monotonic(), [0.0, 0.0]
    lines = open(file, "a", buffering=1)  # noqa: SIM115

    def patient(*arguments):
        chosen, recipe = resolve(*arguments)
        return chosen, dataclasses.replace(recipe, patience=None)

    def stepped(self, made) -> None:
        on_step(self, made)
        now = time.monotonic() - begun
        if now - last[0] >= 0.5:
            last[0] = now
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            native = len(os.listdir("/proc/self/task"))
            lines.write(json.dumps([round(now, 3), made.number, resident, files, threads, native]) + "\n")
        if now > seconds and not last[1]:  # a second signal would end it at once
            last[1] = now
            os.kill(os.getpid(), signal.SIGTERM)

    StageRun.on_step, run.resolve = stepped, patient


def slope(points: list[tuple[float, float]]) -> float:
    """Theil and Sen's: the median of the slopes between points that lie far apart."""
    half = len(points) // 2
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points[: len(points) - half], points[half:], strict=True))


def soak(toy: Toy, tally: Tally, seconds: int) -> None:
    out, file = toy.folder("soak"), toy.root / "soak.jsonl"
    file.unlink(missing_ok=True)
    line = toy.flags("adapt", out, epochs=10**6, save_every_steps=50, lr=1e-4)
    ended = toy.run(line, [[__name__, "watched", {"file": str(file), "seconds": seconds}]], seconds=2 * seconds + 120)
    assert ended.code == 143, f"exit code {ended.code}: {ended.said[-1500:]}"
    check_snapshots(out)
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    rows = [row for row in rows if row[0] > WARM_UP * seconds]
    assert len(rows) >= 20, f"{len(rows)} rows"
    spent = rows[-1][0] - rows[0][0]
    resident = statistics.median(row[2] for row in rows)
    growth = slope([(row[0], row[2]) for row in rows]) * spent / resident
    tally.notes |= {
        "steps": rows[-1][1],
        "epochs scored": rows[-1][1] // 4,
        "MiB resident": round(resident / 2**20, 1),
        "growth of memory in percent": round(100 * growth, 3),
        "most files open": max(row[3] for row in rows),
        "most threads": max(row[5] for row in rows),
        "longest stall in seconds": round(max(b[0] - a[0] for a, b in itertools.pairwise(rows)), 2),
    }
    half = len(rows) // 2
    for column, what in ((3, "open files"), (4, "threads of Python's"), (5, "threads")):
        before, after = (statistics.median(row[column] for row in part) for part in (rows[:half], rows[half:]))
        assert after <= before, f"{what}: {before} in the first half, {after} in the second"
    assert growth < GROWTH, f"resident memory grew by {100 * growth:.2f} % in {spent:.0f} s"
    assert tally.notes["longest stall in seconds"] < _STALL


def run(seed: int, count: int) -> dict:
    """count: seconds. The seed changes nothing: it is one run."""
    tally = Tally("soak", seed, 1)
    for number in tally.seeds():
        with tally.case(number):
            soak(shared(), tally, count)
    return tally.result()
