"""Case x Variant -> Row: the gate first, then interleaved timing of what passed it.

On CUDA a row has milliseconds (median, p20, p80), the share of the floor and peak memory; on a CPU it has ratios within the run alone.
Whatever has no time says in one sentence why.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.case import (
    CRASHED,
    LOST,
    MISSING,
    SKIPPED,
    UNSUPPORTED,
    WRONG,
    Case,
    Inputs,
    Row,
    Variant,
    Verdict,
    cotangents,
    installed,
    mapped,
    nbytes,
    tensors_of,
)
from bench.failures import DeviceLostError, check_device, guarded, sentence
from bench.gate import SEED, Gate, leaves
from bench.settings import Settings

COMPILED_ON_CPU = "it is compiled, and compiled variants are timed on CUDA only."


@dataclass
class _Runner:
    """A variant that passed the gate, with its rotated inputs."""

    case: Case
    variant: Variant
    verdict: Verdict
    function: Callable[..., Any]
    given: list[tuple[Inputs, list[Tensor]]]
    laps: list[list[float]] = field(default_factory=list)  # per repetition the milliseconds of each part
    peak_mb: float | None = None
    resident_mb: float | None = None
    batch: int | None = None

    def drop(self) -> None:
        """Lets go of the memory; what was measured stays."""
        self.function, self.given = _gone, []

    def once(self, turn: int, clock) -> list:
        """One call, or ``case.calls`` of them; returns the marks: start, end of the forward pass and, with gradients, end."""
        case = self.case
        inputs, upstream = self.given[turn % len(self.given)]
        clock.ready()
        marks = [clock.mark()]
        if case.gradients:
            outputs = tensors_of(self.function(**inputs))
            marks.append(clock.mark())
            # ones for scalar losses, whose dtype differs between implementations
            upstream = [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)] if outputs[0].dim() else None
            torch.autograd.grad(outputs, [inputs[name] for name in case.gradients], upstream)
        else:
            with torch.set_grad_enabled(case.mode != "fwd"):
                for _ in range(case.calls):
                    self.function(**inputs)
        marks.append(clock.mark())
        return marks


def measure(case: Case, variants: Sequence[Variant], settings: Settings) -> list[Row]:
    """The rows of one case, one a mode, variant and baseline. Raises DeviceLostError."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled functions share a limit of recompilations, past which they silently are not compiled
    timing.release(case.device)
    rows: list[Row] = []
    runners: list[_Runner] = []
    try:
        gate = Gate(case)
    except Exception as error:
        check_device(case, "the reference")
        note = f"its reference could not be computed: {sentence(error)}"
        return [_row(case, v, settings, status=CRASHED, note=note) for v in variants]
    try:
        for group in [[variant] for variant in variants] if case.alone else [variants]:
            runners += _measured(case, group, gate, settings, rows)
    except DeviceLostError as error:
        lost = [variant for variant in variants if variant.name == error.variant]
        error.rows = [*rows, *(_row(case, variant, settings, status=LOST, note=str(error)) for variant in lost)]
        raise
    for runner in runners:
        rows += _timed_rows(runner, runners, settings)
    order = {variant.name: i for i, variant in enumerate(variants)}
    return sorted(rows, key=lambda row: order[row.variant])


def _measured(case: Case, variants: Sequence[Variant], gate: Gate, settings: Settings, rows: list[Row]) -> list[_Runner]:
    """Those of ``variants`` that were timed, without their memory; the others have their rows in ``rows``."""
    timing.release(case.device)
    runners: list[_Runner] = []
    shared: list[tuple[Inputs, list[Tensor]]] = []
    for variant in variants:
        refusal = _refusal(case, variant, settings)
        if refusal is not None:
            rows.append(_row(case, variant, settings, status=refusal[0], note=refusal[1]))
            continue
        outcome = guarded(lambda variant=variant: _admit(case, variant, gate, shared))
        if isinstance(outcome, _Runner):
            runners.append(outcome)
        elif isinstance(outcome, Verdict):
            note = f"{outcome.worst} is off by {outcome.error:.2e}, limit {outcome.limit:.2e}."
            rows.append(_row(case, variant, settings, outcome, status=WRONG, note=note))
        else:
            rows.append(_row(case, variant, settings, status=outcome[0], note=outcome[1]))
        check_device(case, variant.name)
    failed = _time(case, runners, settings)
    for runner in runners:
        if runner.variant.name in failed:
            rows.append(_row(case, runner.variant, settings, runner.verdict, status=CRASHED, note=failed[runner.variant.name]))
        runner.drop()
    return [runner for runner in runners if runner.variant.name not in failed]


def _gone(**inputs: Any) -> None:
    raise RuntimeError("this variant was let go of after it was measured.")


def _refusal(case: Case, variant: Variant, settings: Settings) -> tuple[str, str] | None:
    if settings.leaves_out(case, variant.name):
        return SKIPPED, "left out by --skip."
    if note := settings.earlier.broke(case, variant.name):
        return LOST, note
    absent = [module for module in variant.needs if not installed(module)]
    if absent:
        return MISSING, f"{absent[0]} is not installed."
    if variant.compiled and case.device != "cuda":
        return UNSUPPORTED, COMPILED_ON_CPU
    sentences = variant.unsupported(case)
    return (UNSUPPORTED, " ".join(sentences)) if sentences else None


def _admit(case: Case, variant: Variant, gate: Gate, shared: list) -> "_Runner | Verdict":
    """Builds, judges, and prepares inputs: a runner, or the red verdict. ``shared`` holds the inputs of all that need no layout of their own."""
    before = timing.allocated_mb(case.device)
    function = variant.build(case)
    resident = timing.allocated_mb(case.device) - before
    verdict = gate.judge(variant, function)
    if not verdict.passed:
        return verdict
    more = {"resident_mb": resident, "batch": getattr(function, "batch", None)}
    if variant.adapt is None and shared:
        return _Runner(case, variant, verdict, function, shared, **more)
    inputs, upstream = case.make_inputs(case.device, case.dtype, SEED), cotangents(case)
    copies = 1 if case.wall else timing.copies_for(nbytes(inputs), case.device)
    if variant.adapt is not None:
        inputs, upstream = variant.adapt(case, inputs, upstream)
    given = [(leaves(case, inputs), upstream)]
    given += [(leaves(case, mapped(inputs, torch.clone)), mapped(upstream, torch.clone)) for _ in range(copies - 1)]
    if variant.adapt is None:
        shared.extend(given)
    return _Runner(case, variant, verdict, function, given, **more)


def _time(case: Case, runners: list[_Runner], settings: Settings) -> dict[str, str]:
    """Fills in laps and peak memory, variants in turn; returns a sentence for each that failed on the way."""
    failed: dict[str, str] = {}
    costs: dict[str, float] = {}
    host = 0.0

    def attempt(runner: _Runner, call: Callable[[], Any]) -> Any:
        result = guarded(call)
        if isinstance(result, tuple):
            failed[runner.variant.name] = result[1]
            check_device(case, runner.variant.name)
        return result

    plain = timing.WallClock(case.device)
    for runner in runners:
        before = timing.allocated_mb(case.device)
        for turn in range(settings.warm_up):
            if runner.variant.name not in failed:
                start = time.perf_counter()
                attempt(runner, lambda runner=runner, turn=turn: runner.once(turn, plain))
                costs[runner.variant.name] = time.perf_counter() - start
        if case.device == "cuda" and runner.variant.name not in failed:
            runner.resident_mb += timing.allocated_mb(case.device) - before  # an optimiser makes its state in the first step
            runner.peak_mb = attempt(runner, lambda runner=runner: timing.peak_mb(lambda: runner.once(0, _Still())))
            if not case.wall:
                seconds = attempt(runner, lambda runner=runner: timing.host_seconds(lambda: runner.once(0, _Still())))
                host = max(host, seconds if isinstance(seconds, float) else 0.0)
    alive = [runner for runner in runners if runner.variant.name not in failed]
    clock = timing.WallClock(case.device) if case.wall or case.device != "cuda" else timing.EventClock(1.3 * host)
    lead = 0.0 if case.wall or case.device != "cuda" else min(1.3 * host, timing.LONGEST_LEAD)
    round_seconds = sum(costs[runner.variant.name] + lead for runner in alive) + 1e-9
    repetitions = settings.least if case.alone else max(settings.least, min(settings.most, int(settings.seconds / round_seconds)))
    marks: dict[str, list] = {runner.variant.name: [] for runner in alive}
    calls = count()
    for turn in range(repetitions):
        first = turn % len(alive) if alive else 0
        for runner in alive[first:] + alive[:first]:  # nobody always follows the same neighbour
            if runner.variant.name not in failed:
                call = next(calls)  # by its neighbour's copy a variant would find the cache warm, so each call takes the next one
                result = attempt(runner, lambda runner=runner, call=call: runner.once(call, clock))
                marks[runner.variant.name].append(result)
    guarded(clock.settle)
    if alive:
        check_device(case, alive[-1].variant.name)  # a fault of the last calls shows only now
    for runner in alive:
        if runner.variant.name not in failed:
            pairs = [list(pairwise(m)) for m in marks[runner.variant.name]]
            runner.laps = [[clock.elapsed(a, b) / case.calls for a, b in parts] for parts in pairs]
    return failed


class _Still:
    """A clock that does nothing, for calls whose time nobody asks for."""

    def ready(self) -> None: ...

    def mark(self) -> None: ...


def _timed_rows(runner: _Runner, alive: list[_Runner], settings: Settings) -> list[Row]:
    case, rows = runner.case, []
    modes = {"fwd": 0, "bwd": 1, "both": None} if case.gradients else {case.mode: None}
    named = {other.variant.name: other for other in alive}
    for baseline in settings.baselines or ("",):
        for mode, part in modes.items():
            own = _of(runner, part)
            row = _row(case, runner.variant, settings, runner.verdict, mode=mode, repetitions=len(own), batch=runner.batch)
            if baseline in named:
                row.baseline = baseline
                samples = (runner.batch or 1) / (named[baseline].batch or 1)  # where each chose its batch, speed is time a sample
                ratios = [samples * theirs / mine for theirs, mine in zip(_of(named[baseline], part), own, strict=True)]
                row.ratio, row.ratio_p20, row.ratio_p80 = _spread(ratios)
            elif baseline:
                row.note = f"no ratio, because the baseline {baseline} has no time."
            if case.device == "cuda":
                row.peak_mb, row.resident_mb = runner.peak_mb, runner.resident_mb
                row.ms, row.ms_p20, row.ms_p80 = _spread(own)
                if case.items is not None and (mode == "both" or not case.gradients):
                    row.unit, row.rate = case.items[0], (runner.batch or 1) * case.items[1] / row.ms * 1e3
                if case.floor is not None and settings.ceilings is not None:
                    row.percent_of_floor = 100 * case.floor.seconds(mode, settings.ceilings) * 1e3 / row.ms
            rows.append(row)
    return rows


def _of(runner: _Runner, part: int | None) -> list[float]:
    return [sum(lap) if part is None else lap[part] for lap in runner.laps]


def _spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, p20 and p80."""
    quantiles = torch.tensor(list(values), dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(quantiles.tolist())


def _row(case: Case, variant: Variant, settings: Settings, verdict: Verdict | None = None, **more: Any) -> Row:
    mode = "both" if case.gradients else case.mode
    row = Row(
        case.family,
        case.name,
        variant.name,
        variant.ours,
        mode,
        str(case.dtype).removeprefix("torch."),
        case.device,
        **settings.facts_but_device(),
    )
    row.device = settings.facts.get("device", case.device)
    if verdict is not None:
        row.error, row.limit, row.worst = verdict.error, verdict.limit, verdict.worst
    if settings.ceilings is not None:
        row.copy_gbs, row.matmul_tflops = settings.ceilings.bytes / 1e9, settings.ceilings.flops / 1e12
    return dataclasses.replace(row, **more)
