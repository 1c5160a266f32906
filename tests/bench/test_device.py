"""`bench.device` without a device: its time boxes, its files, its refusals. The families themselves run in the smoke test."""

import csv
import json
import subprocess
import sys
import time

import pytest
import torch

from bench import device, table
from bench.case import Row


def fake_parts(monkeypatch, *parts):
    monkeypatch.setattr(device, "parts", lambda cpu: list(parts))


def rows_script(family, *variants, then=""):
    """A process that behaves as a family does: rows into --csv, also when it is interrupted."""
    rows = [Row(family, "case", variant, False, "both", "bf16", "GPU X", ms=1.5) for variant in variants]
    text = table.csv_text(rows)
    body = f"import sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[sys.argv.index('--csv') + 1])\ntry:\n    print('running')\n    {then or 'pass'}\n"
    return f"{body}except KeyboardInterrupt:\n    pass\nfinally:\n    (folder / 'a.csv').write_text({text!r})\n"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_parts_write_as_they_go_and_a_slow_one_is_cut_off_with_its_rows(monkeypatch, tmp_path):
    fake_parts(
        monkeypatch,
        device.Part("machine", ("-c", 'print(\'MACHINE {"device": "GPU X"}\')'), 0.5, rows=False),
        device.Part("quick", ("-c", rows_script("quick", "ours", "peer")), 0.5, least=1),
        device.Part("slow", ("-c", rows_script("slow", "half", then="time.sleep(60)")), 0.05, least=4),
        device.Part("broken", ("-c", "raise SystemExit('it broke')"), 0.5, least=1),
        device.Part("late", ("-c", "pass"), 0.5, least=10_000),
    )
    started = time.monotonic()
    assert device.main(["--out", str(tmp_path), "--minutes", "1", "--rehearse"]) == 0
    assert time.monotonic() - started < 50
    rows = read(tmp_path / "rows.csv")
    assert [(row["family"], row["variant"]) for row in rows] == [("quick", "ours"), ("quick", "peer"), ("slow", "half")]
    assert json.loads((tmp_path / "machine.json").read_text()) == {"device": "GPU X"}
    summary = (tmp_path / "summary.md").read_text()
    assert "| slow | cut off by its time box" in summary
    assert "| broken | exit 1: it broke" in summary
    assert "| late | not begun" in summary
    assert "device: GPU X" in summary
    assert len(list(tmp_path.iterdir())) <= 6
    # another call with the same folder replaces a part's rows and keeps the others
    fake_parts(monkeypatch, device.Part("quick", ("-c", rows_script("quick", "again")), 0.5, least=1))
    assert device.main(["--out", str(tmp_path), "--minutes", "1", "--rehearse", "--parts", "quick"]) == 0
    assert [(row["family"], row["variant"]) for row in read(tmp_path / "rows.csv")] == [("slow", "half"), ("quick", "again")]


def test_the_parts_name_commands_that_exist():
    names = [part.name for part in device.parts(False)]
    assert names[:3] == ["machine", "tests", "train_step"]
    from bench import families

    assert set(families.NAMES) <= set(names), "every family is asked on a GPU"
    assert sum(part.name == "aot" for part in device.parts(True)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU may run it")
def test_refusals(tmp_path, capsys):
    assert device.main(["--out", str(tmp_path)]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
    assert device.main(["--out", str(tmp_path), "--rehearse", "--parts", "flight"]) == 2
    assert "unknown part 'flight'; choose among machine, tests" in capsys.readouterr().err
    assert device.main(["--out", str(tmp_path), "--rehearse", "--minutes", "0"]) == 2
    assert "--minutes must be positive" in capsys.readouterr().err


def test_it_needs_torch_alone():
    """Also where nothing else of the field is installed."""
    blocked = ("open_clip", "tyro", "xformers", "nvidia", "pycocoevalcap", "liger_kernel", "cut_cross_entropy", "jinja2", "matplotlib")
    script = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\nimport bench.device, bench.__main__, bench.aot\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
