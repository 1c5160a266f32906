"""A cache in the making: what is to be built, and the journal of what is built already.

The journal's first line is the key of the build, every other one the row and the entry of an image whose pixels are in place.
"""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import IO

from tqdm import tqdm

from fastidc.data.cache import HEADER_BYTES, Entry, digest_of, unchanged
from fastidc.data.cache_builders import Builder, alike


@dataclass
class Plan:
    """What is to be built, and where."""

    out: Path
    size: int
    workers: int
    names: list[str]
    paths: list[Path]
    about: dict
    builder: Builder
    report: Callable[[str], None]
    progress: bool
    done: dict[int, Entry] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def journal(self) -> Path:
        return self.out.with_name(f"{self.out.name}.journal")

    @property
    def image_bytes(self) -> int:
        return 3 * self.size * self.size

    @property
    def index_start(self) -> int:
        return HEADER_BYTES + len(self.names) * self.image_bytes

    def start_of(self, row: int) -> int:
        return HEADER_BYTES + row * self.image_bytes

    def key(self) -> str:
        """The same for builds that may go on with each other's work."""
        return digest_of(json.dumps([self.size, alike(self.builder.facts), self.names]).encode()).hex()

    def kept(self) -> str:
        """For the end of a sentence about a build that did not finish."""
        return f"{len(self.done):,} of {len(self.names):,} images are done, and the same command goes on from there."

    def clear(self) -> None:
        """Takes away what lies beside the cache."""
        for path in (self.partial, self.journal):
            with suppress(OSError):
                path.unlink()


def open_journal(plan: Plan, file: int) -> IO[str]:
    """The journal, open for more lines, each of which a kill of this process leaves there. What it says of ``file``, and pixels and images
    confirm, is in ``plan.done``."""
    first = json.dumps({"key": plan.key()})
    lines: list[bytes] = []
    with suppress(FileNotFoundError):
        lines = plan.journal.read_bytes().splitlines(keepends=True)
    if not lines or lines[0].decode(errors="replace") != first + "\n":
        if lines:
            plan.report(f"{plan.partial}: was being built of other images or in another way, and starts again.")
        journal = plan.journal.open("w", 1, encoding="utf-8")
        journal.write(first + "\n")
        return journal
    said, length = _read(lines)
    os.truncate(plan.journal, length)

    def holds(item: tuple[int, Entry]) -> bool:
        row, entry = item
        return zlib.crc32(os.pread(file, plan.image_bytes, plan.start_of(row))) == entry.crc32 and unchanged(entry, plan.paths[row])

    held = each(plan, holds, list(said.items()), "check what is done")
    plan.done.update(item for item, good in zip(said.items(), held, strict=True) if good)
    return plan.journal.open("a", 1, encoding="utf-8")


def _read(lines: list[bytes]) -> tuple[dict[int, Entry], int]:
    """Row -> entry of the journal's whole lines, and their length in bytes; a kill may have cut the last one short."""
    said: dict[int, Entry] = {}
    length = len(lines[0])
    for line in lines[1:]:
        try:
            row, *values = json.loads(line)
            said[row] = Entry(*values)
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            del said[row]
            break
        length += len(line)
    return said, length


def note(plan: Plan, journal: IO[str], row: int, entry: Entry) -> None:
    """The pixels of ``row`` are written."""
    plan.done[row] = entry
    journal.write(json.dumps([row, *astuple(entry)], separators=(",", ":")) + "\n")


def each(plan: Plan, function: Callable, items: Sequence, what: str) -> list:
    """function(item) of every item in their order, by the plan's threads, with a bar called ``what`` where it takes longer."""
    with ThreadPoolExecutor(plan.workers) as pool:
        bar = {"desc": what, "unit": "image", "leave": False, "delay": 1, "disable": not plan.progress}
        return list(tqdm(pool.map(function, items), total=len(items), **bar))
