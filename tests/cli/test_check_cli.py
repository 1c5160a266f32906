"""`fastidc check` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import check_cases
import pytest
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.cli import main


def test_exit_codes_table_and_files(tmp_path, capsys):
    tree = check_cases.spot(tmp_path / "own")
    assert main(["check", str(tree)]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert shown.splitlines()[-1] == f"{tree}: nothing is wrong with any pair."
    (tree / "resized_images" / "9.png").write_bytes(b"<html>")
    (tree / "resized_images" / "8.png").unlink()
    out, bad = tmp_path / "out.json", tmp_path / "bad.json"
    assert main(["check", str(tree), "--json", str(out), "--quarantine", str(bad)]) == 1
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].split()[:5] == ["level", "kind", "file", "place", "field"]
    assert lines[1].split()[:5] == ["bad", "image-missing", "test.json", "[0]", "img_id"]
    assert lines[2].split()[:5] == ["bad", "image-foreign", "train.json", "[1]", "img_id"]
    assert "a web page: the download has failed; replace the file" in lines[2]
    assert "2 pairs are bad; mend them, or leave them out: --quarantine FILE." in shown
    assert f"wrote {bad}: 2 pairs" in shown
    written = json.loads(out.read_text())
    assert (written["exit_code"], written["bad_pairs"], written["dataset"]) == (1, 2, "spot")
    assert written["counts"]["bad"] == {"image-missing": 1, "image-foreign": 1}
    assert {"level", "kind", "file", "place", "field", "what", "fix", "ids"} == set(written["problems"][0])
    assert [pair["id"] for pair in json.loads(bad.read_text())["pairs"]] == ["8.png", "9.png"]
    assert main(["check", str(tree), "--limit", "1", "--no-decode"]) == 1
    assert "image-foreign" not in capsys.readouterr().out
    (tree / "val.json").write_text("{")
    assert main(["check", str(tree), "--dataset", "spot", "--quick"]) == 2
    assert "cannot be read until what is fatal above is mended" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "absent")]) == 2
    assert "no such data folder" in capsys.readouterr().err
    assert main(["check", str(tree), "--quick", "--no-decode"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_training_leaves_out_what_is_quarantined(tmp_path, capsys, monkeypatch):
    """Whole pairs, in training, in the cache, and where the run is judged again."""
    monkeypatch.setenv("PATH", "")  # METEOR takes seconds to start
    monkeypatch.delenv("JAVA_HOME", raising=False)
    data, bad, run = (
        worlds.clevr_tree(tmp_path / "data", {"train": list(range(7)), "val": [20], "test": [30, 31]}),
        tmp_path / "bad.json",
        tmp_path / "run",
    )
    (data / "sc_images" / "CLEVR_semantic_000003.png").write_bytes(b"")
    (data / "nsc_images" / "CLEVR_nonsemantic_000031.png").unlink()
    few = ["--preset", "tiny", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--data", str(data), "--loader", "pillow"]
    assert main(["finetune", *few, "--out", str(run)]) == 2
    capsys.readouterr()
    assert main(["check", str(data), "--quarantine", str(bad)]) == 1
    assert {pair["id"] for pair in json.loads(bad.read_text())["pairs"]} == {"000003.png", "000031.png"}
    assert main(["finetune", *few, "--out", str(run), "--quarantine", str(bad)]) == 0
    assert "bad.json: 2 pairs are left out (1 of train, 1 of test)" in capsys.readouterr().out
    assert sorted(json.loads((run / "change_test.json").read_text())) == ["000030.png", "000030.png_n"]
    assert main(["evaluate", "run", str(run), "--beams", "1", "--resamples", "0", "--device", "cpu"]) == 0
    assert main(["cache", "build", "--data", str(data), "--size", "16", "--quarantine", str(bad)]) == 0
    assert "24 images of 16 x 16" in capsys.readouterr().out
    annotations = data / "change_captions.json"
    annotations.write_text(annotations.read_text().replace("the", "a", 1))
    assert main(["finetune", *few, "--out", str(tmp_path / "other"), "--quarantine", str(bad)]) == 2
    assert "bad.json" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_help_fits_a_screen():
    done = subprocess.run(
        [sys.executable, "-m", "fastidc.cli", "check", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"COLUMNS": "80"},
        check=True,
    )
    assert len(done.stdout.splitlines()) <= 40
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Example: fastidc check" in done.stdout
