"""What an earlier run has answered already: its rows, read back, so that another call goes on where it stopped."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.case import LOST, SKIPPED, Case
from fastidc.errors import FastidcError

COLUMNS = {"family", "case", "dtype", "variant", "device", "status", "note"}
Key = tuple[str, str, str, str]
WHOLLY = 2  # cases in which a variant has to break the device before it is left out of all others


@dataclass(frozen=True)
class Earlier:
    """``answers``: (family, case, dtype, variant) with a row; ``lost``: those that left the device unusable, each with its row's note."""

    answers: frozenset[Key] = frozenset()
    lost: dict[Key, str] = field(default_factory=dict)

    def has(self, case: Case, variants: Iterable[str]) -> bool:
        """Whether every one of ``variants`` has its row. The rows of a case are written together, so some are not enough: it was broken off."""
        return all(_key(case, variant) in self.answers for variant in variants)

    def broke(self, case: Case, variant: str) -> str | None:
        """Why ``variant`` is not to be tried again here; None where nothing speaks against it."""
        if note := self.lost.get(_key(case, variant)):
            return note
        elsewhere = [name for family, name, _, other in self.lost if (family, other) == (case.family, variant)]
        return f"it left the device unusable at {', '.join(elsewhere)}." if len(elsewhere) >= WHOLLY else None


def _key(case: Case, variant: str) -> Key:
    return case.family, case.name, str(case.dtype).removeprefix("torch."), variant


def read(path: Path | None, device: str) -> Earlier:
    """The rows in ``path``, which have to be of ``device``; one that was left out on purpose is no answer. No file, no rows."""
    if path is None or not path.is_file():
        return Earlier()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and COLUMNS - set(rows[0]):
        raise FastidcError(f"{path}: not a file of bench rows; the columns {', '.join(sorted(COLUMNS))} were expected.")
    if others := [row["device"] for row in rows if row["device"] != device]:
        raise FastidcError(f"{path}: its rows are of {others[0]}, and this is {device}; go on with rows of this device, or with none.")
    named = {(row["family"], row["case"], row["dtype"], row["variant"]): row for row in rows if row["status"] != SKIPPED}
    return Earlier(frozenset(named), {key: row["note"] for key, row in named.items() if row["status"] == LOST})
