"""`bench.device` without a device: its time boxes, its files, what it goes on from, its refusals. The families run in the smoke test."""

import csv
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import device, families, plan, table
from bench.__main__ import chosen_cases, family_of
from bench.case import LOST, Row
from bench.plan import Part

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Part("machine", ("-c", 'print(\'MACHINE {"device": "GPU X"}\')'), 1, least=0, rows=False, always=True)


def fake_parts(monkeypatch, *parts):
    monkeypatch.setattr(plan, "parts", lambda cpu: list(parts))


@pytest.fixture(autouse=True)
def handler():
    """`device.main` takes SIGTERM for the process that it is run in."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def rehearse(out, *more):
    return device.main(["--out", str(out), "--rehearse", "--minutes", "1", *map(str, more)])


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
        MACHINE,
        Part("quick", ("-c", rows_script("quick", "ours", "peer")), 5, least=1),
        Part("slow", ("-c", rows_script("slow", "half", then="time.sleep(60)")), 2, least=3),
        Part("broken", ("-c", "raise SystemExit('it broke')"), 5, least=1),
        Part("late", ("-c", "pass"), 5, least=10_000, rest=True),
    )
    started = time.monotonic()
    assert rehearse(tmp_path) == 0
    assert time.monotonic() - started < 50
    rows = read(tmp_path / "rows.csv")
    assert [(row["family"], row["variant"]) for row in rows] == [("quick", "ours"), ("quick", "peer"), ("slow", "half")]
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["device"] == "GPU X"
    assert facts["parts"]["quick"].startswith("done")
    summary = (tmp_path / "summary.md").read_text()
    assert "| slow | cut off by its time box" in summary
    assert "| broken | exit 1: it broke" in summary
    assert "| late | not begun" in summary
    assert "device: GPU X" in summary
    assert {path.name for path in tmp_path.iterdir()} <= set(device.FILES)
    # another call with the same folder replaces a part's rows and keeps the others
    fake_parts(monkeypatch, Part("quick", ("-c", rows_script("quick", "again")), 5, least=1))
    assert rehearse(tmp_path, "--parts", "quick") == 0
    assert [(row["family"], row["variant"]) for row in read(tmp_path / "rows.csv")] == [("slow", "half"), ("quick", "again")]


def test_a_call_goes_on_where_another_stopped(monkeypatch, tmp_path):
    """Its folder is emptied between calls, so the files come from a copy: what was done is not begun, and all rows are there in the end."""
    refusing = "raise SystemExit('it was begun again')"
    fake_parts(monkeypatch, MACHINE, Part("first", ("-c", rows_script("first", "ours")), 5, 1), Part("second", ("-c", refusing), 5, 1))
    assert rehearse(tmp_path / "one") == 0
    script = "import sys; print(open(sys.argv[sys.argv.index('--done') + 1]).read())\n" + rows_script("second", "ours")
    fake_parts(monkeypatch, MACHINE, Part("first", ("-c", refusing), 5, 1), Part("second", ("-c", script), 5, 1))
    assert rehearse(tmp_path / "two", "--resume", tmp_path / "one") == 0
    assert [row["family"] for row in read(tmp_path / "two" / "rows.csv")] == ["first", "second"]
    states = json.loads((tmp_path / "two" / "machine.json").read_text())["parts"]
    assert all(state.startswith("done") for state in states.values()), states
    log = (tmp_path / "two" / "log.txt").read_text()
    assert "first,case,ours" in log, "a part is given the rows there are"
    assert "begun again" in log, "the first call's log is kept"


def test_what_breaks_the_device_is_left_out_and_its_family_goes_on(monkeypatch, tmp_path):
    """The first process of a part loses the device and writes so; the second finds that in --done and does the rest."""
    lost = table.csv_text([Row("toy", "one", "bad", False, "both", "bf16", "GPU X", status=LOST, note="it left the device unusable.")])
    rest = table.csv_text(
        [
            Row("toy", "one", "bad", False, "both", "bf16", "GPU X", status=LOST, note="it left the device unusable."),
            Row("toy", "one", "good", True, "both", "bf16", "GPU X", ms=1.0),
            Row("toy", "two", "good", True, "both", "bf16", "GPU X", ms=1.0),
        ]
    )
    script = (
        "import sys\nfrom pathlib import Path\nfolder, done = (Path(sys.argv[sys.argv.index(f) + 1]) for f in ('--csv', '--done'))\n"
        f"again = done.is_file() and 'unusable' in done.read_text()\n(folder / 'a.csv').write_text({rest!r} if again else {lost!r})\n"
        "sys.exit(None if again else 'bench: bad left the device unusable')\n"
    )
    fake_parts(monkeypatch, MACHINE, Part("toy", ("-c", script), 20, 1))
    assert rehearse(tmp_path) == 0
    rows = [(row["case"], row["variant"], row["status"]) for row in read(tmp_path / "rows.csv")]
    assert rows == [("one", "bad", "lost"), ("one", "good", "ok"), ("two", "good", "ok")]
    assert "| toy | done" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "log.txt").read_text().count("===== toy") == 2


def test_ended_from_outside_it_keeps_what_it_had(tmp_path):
    """As a time limit does it: rows are on disk while the part runs, and the part ends with the call."""
    body = rows_script("slow", "half", then="(folder / 'first.csv').write_text(FIRST); time.sleep(60)")
    first = table.csv_text([Row("quick", "case", "ours", True, "both", "bf16", "GPU X", ms=1.0)])
    parts = f"[plan.Part('slow', ('-c', {f'FIRST = {first!r}' + chr(10) + body!r}), 50, 1)]"
    script = f"from bench import device, plan\nplan.parts = lambda cpu: {parts}\nraise SystemExit(device.main())"
    command = [sys.executable, "-c", script, "--out", str(tmp_path / "out"), "--rehearse", "--minutes", "1"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        end = time.monotonic() + 40
        while not (tmp_path / "out" / "rows.csv").is_file() and time.monotonic() < end:
            time.sleep(0.1)
        assert [row["family"] for row in read(tmp_path / "out" / "rows.csv")] == ["quick"], "while it runs"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert [row["family"] for row in read(tmp_path / "out" / "rows.csv")] == ["slow", "quick"]
    states = json.loads((tmp_path / "out" / "machine.json").read_text())["parts"]
    assert states == {"slow": "begun, and the call ended before it did"}


def test_the_plan_fits_nine_minutes_and_leaves_everyone_something():
    parts = [part for part in plan.parts(False) if not part.rest]
    assert [part.name for part in parts][:3] == ["machine", "tests", "train_step"]
    assert sum(part.seconds for part in parts) < 540
    assert f" {sum(part.seconds for part in parts):.0f}\n" in plan.__doc__, "the table and the parts agree"
    left = 540.0
    for i, part in enumerate(parts):  # each takes all it may
        assert left >= part.least, part.name
        left -= plan.box(part, parts[i + 1 :], left)
    assert left >= 0
    asked = {word for part in plan.parts(False) for word in part.command}
    assert set(families.NAMES) <= asked, "every family is asked on a GPU"
    assert sum(part.name == "aot" for part in plan.parts(True)) == 1


@pytest.mark.parametrize(
    ("part", "count"),
    [("train_step", 4), ("largest", 2), ("attention", 10), ("linear_cross_entropy", 2), ("info_nce", 2), ("generate", 1), ("small", 4)],
)
def test_the_plan_names_cases_and_variants_that_exist(part, count):
    words = next(p.command for p in plan.parts(False) if p.name == part)
    only = [value for flag, value in itertools.pairwise(words) if flag == "--only"]
    found = {}
    for name in (word for word in words if word in families.NAMES):
        family = family_of(name)
        found |= {case.name: (family, case) for case in chosen_cases(name, family, "paper", "cpu", torch.bfloat16, only)}
    assert len(found) == count
    for skipped in (value for flag, value in itertools.pairwise(words) if flag == "--skip"):
        case, _, variant = skipped.partition("::")
        assert variant in {v.name for v in found[case][0].variants(found[case][1])}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a machine with a GPU may measure: run it where there is none, or with CUDA_VISIBLE_DEVICES="
)
def test_refusals(tmp_path, capsys):
    assert device.main(["--out", str(tmp_path)]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
    assert device.main(["--out", str(tmp_path), "--rehearse", "--parts", "flight"]) == 2
    assert "unknown part 'flight'; choose among machine, tests" in capsys.readouterr().err
    assert device.main(["--out", str(tmp_path), "--rehearse", "--minutes", "0"]) == 2
    assert "--minutes must be positive" in capsys.readouterr().err
    assert device.main(["--minutes", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("bench.device: the following arguments are required: --out;")
    (tmp_path / "old").mkdir()
    assert rehearse(tmp_path, "--resume", tmp_path / "old") == 2
    assert "no earlier call of bench.device ended there" in capsys.readouterr().err
    for name in ("old", "new"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "machine.json").write_text("{}")
    assert rehearse(tmp_path / "new", "--resume", tmp_path / "old") == 2
    assert "has a machine.json already" in capsys.readouterr().err


def test_it_needs_torch_alone():
    """Also where nothing else of the field is installed."""
    blocked = ("open_clip", "tyro", "xformers", "nvidia", "pycocoevalcap", "liger_kernel", "cut_cross_entropy", "jinja2", "matplotlib")
    script = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\nimport bench.device, bench.__main__, bench.aot\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
