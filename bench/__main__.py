"""`python -m bench FAMILY...`: speed of fastidc and its peers, after a correctness gate. `--list` names the families and their cases."""

import argparse
import contextlib
import dataclasses
import importlib
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from bench import earlier, families, machine, table, timing
from bench.arguments import Parser, answered
from bench.case import Case, Row
from bench.cases import Scale
from bench.failures import DeviceLostError
from bench.harness import measure
from bench.settings import Settings
from fastidc.errors import FastidcError
from fastidc.files import write_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMOKE = {"seconds": 0.05, "least": 3, "most": 5, "warm_up": 1}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bench", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"one or more of {', '.join(families.NAMES)}, or all")
    parser.add_argument("--list", action="store_true", help="families and the names of their cases, nothing measured")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and a few repetitions, on whatever device there is")
    parser.add_argument("--cpu", action="store_true", help="on the CPU: ratios within this run, no milliseconds")
    parser.add_argument("--only", metavar="SUBSTRING", action="append", help="cases whose name contains it; may be given several times")
    parser.add_argument("--variant", metavar="SUBSTRING", help="variants whose name contains it; the baselines always run")
    parser.add_argument(
        "--skip", metavar="NAME", action="append", default=[], help="leave out the variant of this name, or of one case: CASE::VARIANT"
    )
    parser.add_argument(
        "--done", metavar="CSV", type=Path, help="rows of an earlier run on this device: cases that it answered are not run again"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="by default bf16 on CUDA and fp32 on a CPU")
    parser.add_argument("--csv", metavar="DIR", type=Path, help="write DIR/<device>/<date>-<family>.csv")
    return parser.parse_args(arguments)


def family_of(name: str) -> ModuleType:
    if name not in families.NAMES:
        raise FastidcError(f"unknown family {name!r}; choose one of {', '.join(families.NAMES)}, or all.")
    return importlib.import_module(f"bench.families.{name}")


def chosen_cases(name: str, family: ModuleType, scale: Scale, device: str, dtype: torch.dtype, only: list[str] | None) -> list[Case]:
    cases = family.cases(scale, device, dtype)
    found = [case for case in cases if only is None or any(part in case.name for part in only)]
    if not found:
        wanted = " or ".join(repr(part) for part in only)
        raise FastidcError(f"no case of {name} has {wanted} in its name; `python -m bench {name} --list` shows them.")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    # A process that was started in the background ignores SIGINT, and then the time box of bench.device could not end it politely.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return answered("bench", lambda: run(parse(arguments)))
    except KeyboardInterrupt:
        print("bench: interrupted; cases that were finished are written.", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    names = list(families.NAMES) if options.family == ["all"] or (options.list and not options.family) else options.family
    if not names:
        raise FastidcError(f"name a family: {', '.join(families.NAMES)}, or all.")
    modules = {name: family_of(name) for name in names}
    device = "cpu" if options.cpu or not cuda else "cuda"
    scale: Scale = "smoke" if options.smoke else "cpu" if device == "cpu" and not options.list else "paper"
    dtype = DTYPES[options.dtype or ("fp32" if device == "cpu" else "bf16")]
    if options.list:
        for name, family in modules.items():
            print(f"{name}: {family.ABOUT}")
            print("\n".join(f"  {case.name}" for case in chosen_cases(name, family, scale, device, dtype, options.only)))
        return 0
    if device == "cpu" and not (options.cpu or options.smoke):
        raise FastidcError("there is no CUDA device here; give --cpu for ratios on the CPU, or --smoke to see that everything runs.")
    # every name is checked before anything is measured
    plan = {name: chosen_cases(name, family, scale, device, dtype, options.only) for name, family in modules.items()}
    facts, ceilings = machine.facts(device), None
    before = earlier.read(options.done, facts["device"])
    warnings.simplefilter("ignore")  # peers' advice to their users; what matters here becomes a row
    print(f"{facts['device']}, commit {facts['commit']}, torch {facts['torch']}, triton {facts['triton']}, {facts['date']}")
    if scale == "smoke":
        print("smoke: tiny shapes and few repetitions; the figures mean nothing.")
    if device == "cuda":
        ceilings = timing.ceilings()
        print(f"ceilings now: copy {ceilings.bytes / 1e9:,.0f} GB/s, bf16 product {ceilings.flops / 1e12:,.0f} TFLOP/s")
    for name, family in modules.items():
        changes = dict(SMOKE) if scale == "smoke" else {}
        changes |= getattr(family, "SETTINGS", {}).get(scale, {})
        settings = dataclasses.replace(
            Settings(baselines=family.BASELINES, facts=facts, ceilings=ceilings, skip=tuple(options.skip), earlier=before), **changes
        )
        _family(name, family, plan[name], settings, options)
    return 0


def _family(name: str, family: ModuleType, cases: list[Case], settings: Settings, options: argparse.Namespace) -> None:
    rows: list[Row] = []
    path: Path | None = None
    print(f"\n{name}: {family.ABOUT}", flush=True)
    try:
        for case in cases:
            wanted = [v for v in family.variants(case) if not options.variant or options.variant in v.name or v.name in family.BASELINES]
            print(f" {case.name} {str(case.dtype).removeprefix('torch.')}", flush=True)
            if settings.earlier.has(case, (v.name for v in wanted if not settings.leaves_out(case, v.name))):
                print("    answered by an earlier run.", flush=True)
                continue
            found = measure(case, wanted, settings)
            rows += found
            if options.csv is not None:  # after every case: what is known is on disk, however the run ends
                path = path or table.csv_path(rows[0], options.csv)
                write_text(path, table.csv_text(rows))
            print("\n".join(table.lines(found)), flush=True)
    except DeviceLostError as error:
        rows += error.rows
        if options.csv is not None and rows:
            write_text(path or table.csv_path(rows[0], options.csv), table.csv_text(rows))
        raise FastidcError(str(error)) from error
    finally:
        if path is not None:
            print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
