"""`python -m tests.faults [--long|--short] [--only NAME ...] [--seed N] [--count N] [--minutes M] [--out FILE.json]`

Every fault so many times, by seed; a line each and a report in JSON. Case n of a fault can be done alone: `--only NAME --seed SEED --count 1`, with
the seed that the report names. The exit code is 1 where anything failed, and 3 where the time was too short for all of it.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

# name: (module, its function, cases of the long form, of the short form)
FAULTS = {
    "kills": ("kills", "run", 200, 8),
    "terms": ("terms", "run", 50, 6),
    "disk": ("disk", "run", 300, 10),
    "numbers": ("numbers", "run", 158, 14),
    "every_step": ("every_step", "run", 72, 6),
    "corruptions": ("corruptions", "run", 1000, 50),
    "images": ("images", "run", 1000, 130),
    "fuzz": ("fuzz", "run", 100_000, 500),
    "worlds": ("worlds", "run", 20, 2),
    "compiled": ("numbers", "run_compiled", 12, 2),
    "soak": ("soak", "run", 900, 40),  # seconds
}


def run(name: str, seed: int, count: int) -> dict:
    """One fault's result."""
    module, function = FAULTS[name][:2]
    started = time.monotonic()
    result = getattr(importlib.import_module(f"tests.faults.{module}"), function)(seed, count)
    return result if "done" in result else tallied(name, seed, count, result, time.monotonic() - started)


def tallied(name: str, seed: int, count: int, found: dict, seconds: float) -> dict:
    """What a fault of files counted, as `tests.faults.tally.Tally` has it: its lists are of what must not be."""
    failures = [{"seed": seed, "what": f"{kind}: {what}"} for kind, whats in found.items() if isinstance(whats, list) for what in whats]
    notes = {kind: value for kind, value in found.items() if isinstance(value, int) and kind != "cases"}
    done = found["cases"]
    return {
        "name": name,
        "seed": seed,
        "asked": count,
        "done": done,
        "passed": done - len(failures),
        "failures": failures,
        "notes": notes,
    } | {"seconds": round(seconds, 1)}


def machine() -> str:
    import torch

    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.machine()}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def said(result: dict, left: float | None) -> str:
    """The line of one fault."""
    counts = f"{result['passed']} of {result['done']} passed" + (f", {result['asked']} asked" if result["done"] != result["asked"] else "")
    notes = ", ".join(
        f"{value:g} {note}" if isinstance(value, int | float) else f"{note} {value}" for note, value in result["notes"].items()
    )
    rest = "" if left is None else f"; {max(0.0, left) / 60:.1f} min left"
    return f"{result['name']:12} {counts}, {result['seconds']:.0f} s{rest}  [{notes}]"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[2])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--long", action="store_true", help="an hour and more")
    form.add_argument("--short", action="store_true", help="minutes; what is done unasked")
    parser.add_argument("--only", action="append", choices=FAULTS, metavar="NAME", help=f"one of {', '.join(FAULTS)}; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each fault")
    parser.add_argument("--minutes", type=float, help="no case begins later")
    parser.add_argument("--out", type=Path, help="the report")
    options = parser.parse_args()

    from tests.faults import tally

    started = time.monotonic()
    if options.minutes is not None:
        tally.until.append(started + 60 * options.minutes)
    report = {"commit": commit(), "machine": machine(), "seed": options.seed, "form": "long" if options.long else "short", "faults": []}
    for name in options.only or FAULTS:
        count = options.count or FAULTS[name][2 if options.long else 3]
        result = run(name, options.seed, count)
        report["faults"].append(result)
        left = None if options.minutes is None else 60 * options.minutes - (time.monotonic() - started)
        print(said(result, left), flush=True)
        for failure in result["failures"]:
            print(f"  seed {failure['seed']}: {failure['what']}", flush=True)
        if options.out is not None:  # after each, so that a kill leaves what is known
            report["seconds"] = round(time.monotonic() - started, 1)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    if any(result["failures"] for result in report["faults"]):
        return 1
    return 3 if any(result["done"] < result["asked"] for result in report["faults"]) else 0


if __name__ == "__main__":
    sys.exit(main())
