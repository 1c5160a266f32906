"""Which implementation serves a call (architecture: dispatch).

A call is described by a `Spec` of static facts. Every backend answers `unsupported(spec)` with sentences; an explicit name that cannot
serve raises with them, "auto" takes the first backend with none. Nothing falls back silently.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastidc.errors import FastidcError


def _constant(function: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, which would import the whole compiler here: three seconds for those who compile nothing."""
    function._dynamo_marked_constant = True
    return function


class Spec(NamedTuple):
    """What is known about a call before it runs; never a tensor's values."""

    op: str
    device: str
    dtype: torch.dtype
    grad: bool
    arch: int = 0
    """Ten times the compute capability of a CUDA device: 90 for Hopper."""
    head_dim: int = 0
    """Attention: 16, 32, 64, 128, or 0 for any other (`head_size`). InfoNCE: the numbers of an embedding."""
    query_length: int = 0
    """Rounded up (`rounded`), so that a compiled graph serves many lengths."""
    key_length: int = 0
    causal: bool = False
    dropout: bool = False
    packed: bool = False
    seeded: bool = False


def rounded(length: int) -> int:
    """The least of 0, 16, 32, 64, 128 that is no less than ``length``; 256 stands for all that is longer."""
    for size in (0, 16, 32, 64, 128):
        if length <= size:
            return size
    return 256


def head_size(head_dim: int) -> int:
    """`Spec.head_dim`. As a choice of constants, because a compiled graph may know a dimension by a symbol only."""
    for size in (16, 32, 64, 128):
        if head_dim == size:
            return size
    return 0


@_constant
def arch_of(device: torch.device) -> int:
    """`Spec.arch` of ``device``; 0 where it is no CUDA device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: ``run`` has the op's own signature."""

    name: str
    run: Callable
    unsupported: Callable[[Spec], list[str]] = field(default=lambda spec: [])


OPS: dict[str, "Op"] = {}


class Op:
    """An op's backends and the order in which "auto" asks them. Stands in `OPS` under its name."""

    def __init__(self, name: str, backends: list[Backend], order: Callable[[Spec], tuple[str, ...]]):
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.order = order
        OPS[name] = self

    def __call__(self, spec: Spec, backend: str) -> Callable:
        """The function that serves. torch.compile takes the choice as a constant: nothing of it is in a graph."""
        return self.backends[self.serving(spec, backend)].run

    def serving(self, spec: Spec, backend: str) -> str:
        """`resolve`, remembered, and with FASTIDC_BACKEND asked where ``backend`` is "auto"."""
        return _serving(self.name, backend, *spec)

    def resolve(self, spec: Spec, backend: str) -> str:
        """The name of the backend that serves; ValueError where none does."""
        if backend == "auto":
            for name in self.order(spec):
                if not self.backends[name].unsupported(spec):
                    return name
            refusals = self.explain(spec)
            raise FastidcError(
                f"no backend of {self.name} serves this call: " + "; ".join(f"{n}: {' '.join(r)}" for n, r in refusals.items())
            )
        if backend not in self.backends:
            raise FastidcError(f"{self.name} has no backend {backend!r}; choose one of auto, {', '.join(self.backends)}.")
        refusals = self.backends[backend].unsupported(spec)
        if refusals:
            raise FastidcError(f"backend {backend!r} cannot serve this {self.name} call: {' '.join(refusals)}")
        return backend

    def explain(self, spec: Spec) -> dict[str, list[str]]:
        """Every backend's refusals for this call, in the order that "auto" asks; an empty list means that it serves."""
        names = dict.fromkeys([*self.order(spec), *self.backends])
        return {name: self.backends[name].unsupported(spec) for name in names}


@functools.cache
def _environment(value: str) -> dict[str, str]:
    choices = {}
    for part in filter(None, (p.strip() for p in value.split(","))):
        op, found, name = part.partition("=")
        if not found or not op or not name:
            raise FastidcError(f"FASTIDC_BACKEND: {part!r} is not of the form op=backend, as in attention=sdpa,info_nce=torch.")
        if op not in OPS:
            raise FastidcError(f"FASTIDC_BACKEND: there is no op {op!r}; choose among {', '.join(OPS)}.")
        if name not in ("auto", *OPS[op].backends):
            raise FastidcError(f"FASTIDC_BACKEND: {op} has no backend {name!r}; choose one of auto, {', '.join(OPS[op].backends)}.")
        choices[op] = name
    return choices


@_constant
def _serving(op: str, backend: str, *facts: Any) -> str:
    """``facts``: a `Spec`'s, one by one, since the compiler knows constants and no classes of ours."""
    return _resolved(op, Spec(*facts), chosen_for(op, backend))


@functools.cache
def _resolved(op: str, spec: Spec, backend: str) -> str:
    return OPS[op].resolve(spec, backend)


def forget() -> None:
    """Choices are remembered; whoever changes a backend (a test, the operator counter) has them made again."""
    _resolved.cache_clear()


def chosen_for(op: str, backend: str) -> str:
    """An explicit name wins over FASTIDC_BACKEND, which wins over "auto"."""
    return backend if backend != "auto" else _environment(os.environ.get("FASTIDC_BACKEND", "")).get(op, "auto")


def check_environment(device: torch.device, dtype: torch.dtype) -> None:
    """FastidcError where FASTIDC_BACKEND names what is not there, or what cannot serve a training step's calls on ``device`` at all: a long run
    asks before it begins."""
    for op in _environment(os.environ.get("FASTIDC_BACKEND", "")):
        spec = Spec(op, device.type, dtype, True, arch_of(device), head_dim=64, query_length=32, key_length=32)
        OPS[op].resolve(spec, chosen_for(op, "auto"))
