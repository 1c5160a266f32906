"""What is measured: a `Case` (a shape, its truth and its floor), a `Variant` (one way to compute it), a `Row` (what came out)."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.roofline import Floor

Inputs = dict[str, Any]  # tensors, lists of tensors, and plain values, by the names of the callables' arguments
OK, WRONG, UNSUPPORTED, MISSING, CRASHED = "ok", "wrong", "unsupported", "missing", "crashed"
SKIPPED, LOST = "skipped", "lost"  # left out on purpose; left the device unusable


@dataclass(frozen=True)
class Verdict:
    """The gate's answer: the worst quantity, its error (relative norm, or what the case's own check says) and the limit it was held to."""

    error: float
    limit: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN


@dataclass(frozen=True)
class Case:
    """One shape of one family on one device in one dtype.

    make_inputs(device, dtype, seed) -> Inputs. ``exact`` gets them widened to float64 and gives the truth; ``plain`` is honest PyTorch in
    the case's own dtype, whose error is the yardstick of the gate. Both, like every variant's callable, take the inputs by name and
    return a tensor or a tuple of them, of the shapes ``outputs``. ``gradients`` names the inputs that want one.
    """

    family: str
    name: str
    shape: Mapping[str, Any]
    device: str
    dtype: torch.dtype
    make_inputs: Callable[[str, torch.dtype, int], Inputs]
    exact: Callable[..., Any] | None = None
    plain: Callable[..., Any] | None = None
    outputs: tuple[tuple[int, ...], ...] = ()
    gradients: tuple[str, ...] = ()
    floor: Floor | None = None
    mode: str = "fwd"  # what the one lap is called where there are no gradients
    per_row: tuple[str, ...] = ()  # inputs whose rows are independent of each other: the gate then compares ``gate_rows`` of them
    gate_rows: int = 48
    gate_inputs: Mapping[str, Any] = field(default_factory=dict)  # stand in for inputs while the gate looks, as in dropout_p=0
    check: "Callable[[Case, Variant, Callable], Verdict] | None" = None  # a gate of the case's own, instead of exact and plain
    wall: bool = False  # wall time from idle to idle, the host's work included; otherwise the device's time alone
    calls: int = 1  # calls in a lap; times are of one
    items: tuple[str, float] | None = None  # what a call works off, as in ("pairs", 1024); of one sample where a callable has a ``batch``
    alone: bool = False  # variants live one after another, because together they do not fit the device; ratios are then of laps apart


@dataclass(frozen=True)
class Variant:
    """One implementation. ``build(case)`` gives its callable and is where its packages are imported. A callable that chose the number of
    samples itself has it as its attribute ``batch``.

    adapt(case, inputs, cotangents) gives the layout that this implementation's users hold and is not timed; restore(case, tensor) takes
    an output or a gradient back from it. ``exact``: a truth of its own, for another algorithm of the same purpose.
    """

    name: str
    build: Callable[[Case], Callable[..., Any]]
    unsupported: Callable[[Case], list[str]] = field(default=lambda case: [])
    ours: bool = False
    needs: tuple[str, ...] = ()  # modules that must be installed
    compiled: bool = False
    adapt: Callable[[Case, Inputs, list[Tensor]], tuple[Inputs, list[Tensor]]] | None = None
    restore: Callable[[Case, Tensor], Tensor] | None = None
    exact: Callable[..., Any] | None = None


@dataclass
class Row:
    """A line of the table and of the CSV. Times are in milliseconds and on CUDA only; ratios are how many times as fast as ``baseline``."""

    family: str
    case: str
    variant: str
    ours: bool
    mode: str
    dtype: str
    device: str
    status: str = OK
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    percent_of_floor: float | None = None  # floor / measured: 100 is the floor
    rate: float | None = None  # of ``unit`` per second
    unit: str = ""
    batch: int | None = None  # samples, where the variant chose their number: the largest that fits
    peak_mb: float | None = None  # what a call holds at its worst, beyond ``resident_mb``
    resident_mb: float | None = None  # what stays between calls: weights, optimiser state, the batch; shared inputs count as nobody's
    baseline: str = ""
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    repetitions: int = 0
    error: float | None = None
    limit: float | None = None
    worst: str = ""
    note: str = ""
    copy_gbs: float | None = None  # the ceilings of this run
    matmul_tflops: float | None = None
    commit: str = ""
    torch: str = ""
    triton: str = ""
    date: str = ""


class MissingError(Exception):
    """A sentence that says what is not installed."""


def installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing more than its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """A tensor, or a sequence of them, as a tuple."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` applied to every tensor within lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def widened(value: Any) -> Any:
    """Floating tensors in float64, on their device."""
    return mapped(value, lambda t: t.double() if t.is_floating_point() else t)


def nbytes(value: Any) -> int:
    total = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    mapped(value, add)
    return total


def cotangents(case: Case, seed: int = 1) -> list[Tensor]:
    """One for every output: 1 for a scalar, noise otherwise. The same for every variant."""
    draw = torch.Generator(device=case.device).manual_seed(seed)
    kind = {"dtype": case.dtype, "device": case.device}
    return [torch.randn(shape, generator=draw, **kind) if shape else torch.ones((), **kind) for shape in case.outputs]
