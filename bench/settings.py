"""How a run measures: the same for all cases of a family."""

from dataclasses import dataclass, field

from bench.case import Case
from bench.earlier import Earlier
from bench.roofline import Ceilings


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``seconds`` is what a case's timed calls may take together, within the bounds on repetitions."""

    seconds: float = 1.5
    least: int = 20
    most: int = 200
    warm_up: int = 3
    baselines: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)  # `bench.machine.facts`
    ceilings: Ceilings | None = None  # on CUDA
    skip: tuple[str, ...] = ()  # names of variants, or "case::variant"
    earlier: Earlier = field(default_factory=Earlier)

    def facts_but_device(self) -> dict[str, str]:
        return {name: value for name, value in self.facts.items() if name != "device"}

    def leaves_out(self, case: Case, variant: str) -> bool:
        return variant in self.skip or f"{case.name}::{variant}" in self.skip
