"""What came of the cases of one fault."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

until: list[float] = []
"""At most one number, of `time.monotonic`: no case begins after it."""


def in_time() -> bool:
    return not until or time.monotonic() < until[0]


class Tally:
    """Counts cases; each has a seed, by which it alone can be done again."""

    def __init__(self, name: str, seed: int, asked: int):
        self.name, self.seed, self.asked = name, seed, asked
        self.done, self.failures, self.notes = 0, [], {}
        self._begun = time.monotonic()

    def seeds(self) -> Iterator[int]:
        """Case ``n`` of seed ``s`` is the first one of seed ``s + n``."""
        for seed in range(self.seed, self.seed + self.asked):
            if not in_time():
                return
            yield seed

    @contextmanager
    def case(self, seed: int) -> Iterator[None]:
        self.done += 1
        try:
            yield
        except Exception as error:  # whatever it is, the others go on
            self.failures.append({"seed": seed, "what": f"{type(error).__name__}: {error}"[:2000]})

    def each(self, case: Callable[["Tally", int], None]) -> dict:
        """``case(tally, seed)`` of every seed; the `result`."""
        for seed in self.seeds():
            with self.case(seed):
                case(self, seed)
        return self.result()

    def add(self, note: str, count: float = 1) -> None:
        self.notes[note] = self.notes.get(note, 0) + count

    def most(self, note: str, value: float) -> None:
        self.notes[note] = max(self.notes.get(note, value), value)

    def result(self) -> dict:
        return {
            "name": self.name,
            "seed": self.seed,
            "asked": self.asked,
            "done": self.done,
            "passed": self.done - len(self.failures),
            "failures": self.failures,
            "notes": dict(sorted(self.notes.items())),
            "seconds": round(time.monotonic() - self._begun, 1),
        }
