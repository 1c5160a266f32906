"""`python -m bench.tiles --arch sm_90 --csv FILE`: every way to cut the attention kernels, and the one that `_tiles.py` names.

Without a GPU the choice is a rule over what the compiler makes of each candidate: no spills; three programs on a multiprocessor if they fit, so
that some load while another computes; then enough bytes in flight to hide memory's latency; the wider tensor-core instruction; few blocks
of queries; warps enough to issue, and no more than those. With ``--time``, on a GPU, the fastest wins.
"""

import csv
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from bench.aot import CHIPS, cached
from bench.arguments import Parser, answered
from bench.kernels import Compilation, attention
from bench.timing import EventClock
from fastidc.errors import FastidcError
from fastidc.files import aside
from fastidc_kernels._tiles import AttentionTile

# Bytes a multiprocessor. Little's law asks for 26 KB at 4.3 TB/s and 0.8 us; a program loads for a part of its life only.
IN_FLIGHT = 96 * 1024
LENGTHS = (16, 32, 64, 128)
HEAD_DIMS = (64, 32, 128)
ITEM_BYTES = 2  # bf16; fp32 has one cut of its own in `_tiles.py`, since it has no tensor cores to feed and its code grows with the tile
USED = {16: 14, 32: 32, 64: 50, 128: 100}  # tokens of a timed sequence: the paper's
COLUMNS = ("arch", "triton", "registers", "spills", "shared_bytes", "mma", "loads_128", "ctas_per_sm")


def candidates(length: int, head_dim: int) -> Iterator[AttentionTile]:
    """Every division of ``length`` queries into blocks, with every number of warps that is no plain waste."""
    for block in (size for size in LENGTHS if size <= length):
        for warps in (1, 2, 4, 8):
            scores, accumulator = block * length // (32 * warps), length * head_dim // (32 * warps)  # a thread's, in registers
            if 4 <= scores <= 128 and accumulator <= 128:
                yield AttentionTile(block, length // block, length, warps)


def score(row: dict, tile: AttentionTile, loaded: int) -> tuple:
    """What the rule prefers, larger is better; ``loaded`` bytes a program reads. The module's docstring says why."""
    programs = row["ctas_per_sm"]
    return (
        not row["spills"] and row["shared_bytes"] <= CHIPS[row["arch"]]["shared"],
        min(programs, 3),
        min(programs * loaded, IN_FLIGHT),
        row["mma"] == "wgmma",
        -tile.blocks,
        min(programs * tile.warps, 16),
        -tile.warps,
    )


@dataclass(frozen=True)
class Key:
    """One entry of the table."""

    backward: bool
    head_dim: int
    length: int

    def compilation(self, tile: AttentionTile, **use) -> Compilation:
        return attention(tile, f"L<={self.length}", backward=self.backward, head_dim=self.head_dim, heads=8, **use)

    @property
    def loaded(self) -> int:
        return (4 if self.backward else 3) * self.length * self.head_dim * ITEM_BYTES


def ranked(
    key: Key, dropout: float, compiled: Callable[[Compilation], dict], clock: bool, others: Mapping[tuple, list[dict]]
) -> list[tuple[dict, AttentionTile]]:
    """Every candidate with its row, best first; by the clock where there is one. ``others``: rows of other versions of Triton; a candidate is as
    good as its worst."""
    found = [(compiled(key.compilation(tile, dropout=dropout)), tile) for tile in candidates(key.length, key.head_dim)]
    if clock:
        found = [({**row, "milliseconds": milliseconds(key, tile, dropout)}, tile) for row, tile in found if not row["spills"]]
        return sorted(found, key=lambda pair: pair[0]["milliseconds"])

    def worst(pair: tuple[dict, AttentionTile]) -> tuple:
        row, tile = pair
        return min(score(each, tile, key.loaded) for each in (row, *others.get((key, dropout, tile), ())))

    return sorted(found, key=worst, reverse=True)


def read(paths: Sequence[Path]) -> dict[tuple[Key, float, AttentionTile], list[dict]]:
    """Searches that other versions of Triton made."""
    found: dict = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                length, block = int(row["length"]), int(row["block_q"])
                key = Key(row["backward"] == "True", int(row["head_dim"]), length)
                tile = AttentionTile(block, length // block, length, int(row["warps"]))
                counts = {name: int(row[name]) for name in ("registers", "spills", "shared_bytes", "loads_128", "ctas_per_sm")}
                found.setdefault((key, float(row["dropout"]), tile), []).append({**row, **counts})
    return found


def milliseconds(key: Key, tile: AttentionTile, dropout: float) -> float:
    """Of one launch on this GPU: 24,576 heads (1,024 pairs, both images, 12 heads), inputs rotated over more than the cache."""
    from fastidc_kernels import attention as kernels

    heads, sequences, width = 12, 2048, 12 * key.head_dim
    options = {"causal": False, "cu_seqlens": None, "longest": 0, "dropout_p": dropout, "faults": None, "tile": tile}
    options["seed"] = torch.tensor([1, 2], device="cuda") if dropout else None

    def inputs():
        qkv = torch.randn(sequences, USED[key.length], 3 * width, device="cuda", dtype=torch.bfloat16)
        return qkv.chunk(3, -1), qkv.new_empty(sequences, USED[key.length], width).normal_(), torch.empty_like(qkv).chunk(3, -1)

    copies = [inputs() for _ in range(2)]  # each far larger than the cache

    def call(i: int) -> None:
        parts, other, gradients = copies[i % 2]
        if key.backward:
            kernels.attention_bwd(*parts, other, *gradients, heads, **options)
        else:
            kernels.attention_fwd(*parts, other, heads, **options)

    for i in range(3):
        call(i)
    clock, marks = EventClock(0.0), []
    for i in range(20):
        start = clock.mark()
        call(i)
        marks.append((start, clock.mark()))
    clock.settle()
    return median(clock.elapsed(start, end) for start, end in marks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.tiles", description="Ways to cut the attention kernels, and the best.")
    parser.add_argument("--arch", choices=sorted(CHIPS), default="sm_90")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="every candidate with what became of it")
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="FILE", help="what other versions of Triton made; the worst counts"
    )
    parser.add_argument("--time", action="store_true", help="measure on this GPU; without it the compiler's output decides")
    arguments = parser.parse_args(argv)
    if arguments.time and not torch.cuda.is_available():
        raise FastidcError("--time needs a CUDA device; leave it out and the compiler's output decides.")
    compiled = functools.partial(cached, arch=arguments.arch, folder=Path(tempfile.gettempdir()) / f"fastidc-tiles-{os.getuid()}")
    rows, others = [], read(arguments.also)
    every = [Key(*facts) for facts in itertools.product((False, True), HEAD_DIMS, LENGTHS)]
    for key in tqdm(every, desc="tiles", unit="key"):
        chosen = []
        for dropout in (0.0, 0.1):
            best = ranked(key, dropout, compiled, arguments.time, others)
            chosen.append(best[0][1])
            every_version = [(row, cut) for own, cut in best for row in (own, *others.get((key, dropout, cut), ()))]
            for row, tile in every_version:
                facts = {"backward": key.backward, "head_dim": key.head_dim, "length": key.length, "dropout": dropout}
                cut = {"block_q": tile.block_q, "warps": tile.warps, "milliseconds": row.get("milliseconds", "")}
                rows.append({**facts, **cut, **{name: row[name] for name in COLUMNS}, "chosen": tile == chosen[-1]})
        print(entry(key, *chosen), flush=True)
    with aside(arguments.csv) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


def entry(key: Key, plain: AttentionTile, dropped: AttentionTile) -> str:
    """A line for `_tiles.py`'s table: without dropout, and with it."""
    cut = [(tile.block_q, tile.warps) for tile in (plain, dropped)]
    place = ("bwd" if key.backward else "fwd", key.head_dim, key.length)
    return f"    {place!r}: {tuple(cut)!r},"


if __name__ == "__main__":
    sys.exit(answered("bench.tiles", main))
