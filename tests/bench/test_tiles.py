"""How the attention kernels' cuts are ranked, and that the table names what the committed search chose."""

import csv
from pathlib import Path

import pytest

from bench import tiles
from fastidc_kernels import _tiles
from fastidc_kernels._tiles import AttentionTile

ROOT = Path(__file__).parents[2]


def row(**facts):
    return {"arch": "sm_90", "spills": 0, "shared_bytes": 1000, "ctas_per_sm": 4, "mma": "wgmma", **facts}


def test_candidates_hold_the_sequence():
    found = list(tiles.candidates(64, 64))
    assert len(found) > 6
    assert all(tile.block_q * tile.blocks == tile.block_k == 64 for tile in found)
    assert AttentionTile(64, 1, 64, 4) in found


def test_the_rule():
    """Worse in one respect after another, the more important first."""
    tile, split = AttentionTile(64, 1, 64, 4), AttentionTile(32, 2, 64, 4)
    ranked = [
        (row(), tile),
        (row(), split),
        (row(mma="mma.sync"), tile),
        (row(ctas_per_sm=2), tile),
        (row(ctas_per_sm=1), tile),
        (row(spills=8), tile),
    ]
    scores = [tiles.score(*pair, loaded=32 * 1024) for pair in ranked]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert tiles.score(row(shared_bytes=300_000), tile, 1) < scores[-2], "what does not fit is as bad as what spills"


@pytest.mark.parametrize("arch", [90, 80])
def test_the_table_is_what_the_search_chose(arch):
    with (ROOT / f"bench/tables/attention-sm_{arch}.csv").open(newline="") as file:
        chosen = [row for row in csv.DictReader(file) if row["chosen"] == "True"]
    keys = {(row["backward"], row["head_dim"], row["length"], row["dropout"]) for row in chosen}
    assert len(keys) == 2 * 3 * 4 * 2  # pass, head size, length, with and without dropout; a row for every version of Triton
    if arch == 90:
        assert {row["triton"] for row in chosen} >= {"3.6.0", "3.9.0"}
    for row in chosen:
        length, size, dropout = int(row["length"]), int(row["head_dim"]), float(row["dropout"]) > 0
        found = _tiles.attention(length, length, size, 2, dropout, row["backward"] == "True", arch)
        assert (found.block_q, found.warps) == (int(row["block_q"]), int(row["warps"])), row


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--csv", "x.csv", "--arch", "sm_70"], "invalid choice: 'sm_70'"),
        ([], "the following arguments are required: --csv"),
        (["--csv", "x.csv", "--time"], "--time needs a CUDA device"),
    ],
)
def test_bad_calls(arguments, sentence, capsys):
    assert tiles.answered("bench.tiles", lambda: tiles.main(arguments)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1
