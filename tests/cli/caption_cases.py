"""What the tests of `fastidc caption` share: a tiny run, a folder of pairs, and rows."""

import io
import json
import sys
import types

import pytest
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import image_pairs, run_folder

from fastidc import Describer
from fastidc.cli import main


@pytest.fixture(scope="module", name="run")
def make_run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module", name="folder")
def make_folder(tmp_path_factory):
    """Six pairs without captions."""
    root = tmp_path_factory.mktemp("pairs")
    image_pairs(root, 6)
    return root


@pytest.fixture(scope="module", name="expected")
def make_expected(run, folder):
    """The rows of the folder's pairs, each captioned alone."""
    describer = Describer(run, "cpu", length_penalty=0.7)
    return [describer(folder / f"{i}.png", folder / f"{i}_2.png") for i in range(6)]


def caption(*argv):
    return main(["caption", *map(str, argv), "--device", "cpu"])


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def check(rows, expected):
    assert len(rows) == len(expected)
    for row, found in zip(rows, expected, strict=True):
        assert row["caption"] == found.caption
        assert row["log_prob"] == pytest.approx(found.log_prob, abs=1e-4)
        assert row["p_change"] == pytest.approx(found.p_change, abs=1e-6)
        assert (row["before"], row["after"]) == (str(found.before), str(found.after))


def give(monkeypatch, text):
    """``text`` on standard input."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))


@pytest.fixture(name="table")
def make_table(folder, tmp_path):
    """The folder's pairs as a table, two of them with a bad image."""
    worlds.noise_image(tmp_path / "whole.png", 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    lines = ["id,before,after", *(f"n{i},{folder}/{i}.png,{folder}/{i}_2.png" for i in range(6))]
    lines[2:2] = [f"cut,{tmp_path}/cut.png,{folder}/0.png"]
    lines[5:5] = [f"gone,{folder}/0.png,{folder}/absent.png"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    return tmp_path / "t.csv"
