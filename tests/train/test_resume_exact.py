"""A run that is interrupted and goes on ends where one left alone ends, to the last bit."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import Killed, check_same_run, kill_after, left, options, train

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.cli import main
from fastidc.train import judge, snapshot
from fastidc.train.ledger import check_ledger
from fastidc.train.precision import Precision

STEPS = 8
OFFICIAL = {"preset": "clevr", "lr": 1e-2, "coef_lr": 0.1}
pytestmark = pytest.mark.usefixtures("runs_without_java")


def interrupted(monkeypatch, stage, after, **how) -> None:
    with monkeypatch.context() as patched:
        kill_after(patched, after)
        with pytest.raises(Killed):
            train(stage, options(**how))


def both(toy, tmp_path, monkeypatch, stage, afters, *, again=None, **how) -> Path:
    """Interrupted runs against one left alone, whose folder is returned."""
    data, start = toy
    how = {"data": data, "start": start, **how}
    train(stage, options(out=tmp_path / "alone", **how))
    for after in afters:
        out = tmp_path / f"after-{after}"
        every = 1 + after % 3
        interrupted(monkeypatch, stage, after, out=out, save_every_steps=every, **how)
        train(stage, options(out=out, resume="auto", save_every_steps=every, **{**how, **(again or {})}))
        check_same_run(out, tmp_path / "alone")
        shutil.rmtree(out)
    return tmp_path / "alone"


def test_at_every_step_of_captioning(toy, tmp_path, monkeypatch):
    """One run that dies after each of its steps; the official optimiser, dropout."""
    data, start = toy
    how = {"data": data, "start": start, "save_every_steps": 1, **OFFICIAL}
    train("finetune", options(out=tmp_path / "alone", **how))
    for step in range(1, STEPS + 1):
        interrupted(monkeypatch, "finetune", step, out=tmp_path / "out", resume="auto", **how)
        assert snapshot.newest(tmp_path / "out" / "snapshots").state["step"] == step
    train("finetune", options(out=tmp_path / "out", resume="auto", **how))
    check_same_run(tmp_path / "out", tmp_path / "alone")
    assert len(left(tmp_path / "out")["rows"]) == STEPS
    samples = [f"{n:06d}.png" for n in range(9)]
    assert check_ledger(tmp_path / "out" / "ledger.jsonl", 2, 4, samples) == {"steps": 8, "epochs": 2, "samples": 16}
    assert not (tmp_path / "out" / "snapshots").exists()


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("adapt", {"preset": "tiny", "batch_size": 4}),  # Muon and AdamW, mirrored pairs
        ("adapt", {**OFFICIAL, "batch_size": 4, "accumulate": 2, "augment": "brightness=0.3,noise=4"}),
        ("adapt", {**OFFICIAL, "batch_size": 4, "micro_batch": 2}),
        pytest.param("adapt", {**OFFICIAL, "batch_size": 4, "precision": "fp16-official"}, marks=pytest.mark.slow),
        pytest.param(
            "finetune", {"preset": "tiny", "precision": "bf16", "select": "last", "steps": 6, "epochs": None}, marks=pytest.mark.slow
        ),
    ],
    ids=["muon", "accumulated", "chunks", "fp16-official", "bf16"],
)
def test_every_way_to_train(toy, tmp_path, monkeypatch, stage, how):
    both(toy, tmp_path, monkeypatch, stage, [5], **how)


def test_a_scaled_loss(toy, tmp_path, monkeypatch):
    """The scale starts where steps are left out and moves every two steps; what was left out is counted on."""
    scaler = functools.partial(torch.amp.GradScaler, "cpu", init_scale=2.0**22, growth_interval=2)
    monkeypatch.setattr(Precision, "scaler", lambda self: scaler())
    alone = both(toy, tmp_path, monkeypatch, "finetune", [5], **OFFICIAL, precision="fp16")
    skipped = [row["step"] for row in left(alone)["rows"] if "skipped" in row]
    assert skipped[0] < 4, "before the snapshot"
    assert skipped[-1] > 5, "and after it"


def test_a_snapshot_after_an_epochs_score(toy, tmp_path, monkeypatch):
    """It goes on with the next epoch, and scores none twice."""
    data, start = toy
    how = {"data": data, "start": start, **OFFICIAL}
    train("finetune", options(out=tmp_path / "alone", **how))
    original, scored = judge.Judge.score, []
    monkeypatch.setattr(judge.Judge, "score", lambda self, records: scored.append(0) or original(self, records))
    with monkeypatch.context() as patched:
        kill_after(patched, 5, before=True)
        with pytest.raises(Killed):
            train("finetune", options(out=tmp_path / "out", save_every_minutes=1e-9, **how))
    state = snapshot.newest(tmp_path / "out" / "snapshots").state
    assert (state["step"], state["epoch"], state["passed"]) == (4, 1, 0)
    train("finetune", options(out=tmp_path / "out", resume="auto", **how))
    assert len(scored) == 2
    check_same_run(tmp_path / "out", tmp_path / "alone")


def test_with_other_workers_and_another_loader(toy, tmp_path, monkeypatch):
    cache = tmp_path / "cache.bin"
    assert main(["cache", "build", "--data", str(toy[0]), "--out", str(cache), "--size", "32"]) == 0
    both(toy, tmp_path, monkeypatch, "finetune", [3], again={"workers": 3, "loader": "cache", "cache": cache}, **OFFICIAL)


def test_early_stopping_and_the_best_epoch_are_remembered(toy, tmp_path, monkeypatch):
    """Every later epoch is worse: the first is kept, and the run ends when the recipe's patience is spent, part of it before the kill."""
    scored = []
    monkeypatch.setattr(judge.Judge, "score", lambda self, records: (-len(scored), {"number": scored.append(0) or len(scored)}))
    data, start = toy
    how = {"data": data, "start": start, **OFFICIAL, "epochs": 20, "batch_size": 8}  # a step an epoch
    train("finetune", options(out=tmp_path / "alone", **how))
    assert len(left(tmp_path / "alone")["rows"]) == 12, "eleven worse epochs after the first"
    scored.clear()
    interrupted(monkeypatch, "finetune", 7, out=tmp_path / "out", save_every_steps=5, **how)
    assert len(scored) == 6
    del scored[4:]  # the snapshot is that of the fifth step, before its epoch's score
    train("finetune", options(out=tmp_path / "out", resume="auto", **how))
    check_same_run(tmp_path / "out", tmp_path / "alone")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["selected"]["epoch"] == 0


def test_a_better_epoch_after_the_snapshot_is_forgotten(toy, tmp_path, monkeypatch):
    """RUN/model.safetensors is that of the snapshot's best epoch again, not of one that is yet to come."""
    data, start = toy
    how = {"data": data, "start": start, **OFFICIAL, "epochs": 3}
    out = tmp_path / "out"
    best = iter([3.0, 9.0])
    monkeypatch.setattr(judge.Judge, "score", lambda self, records: (next(best), {}))
    interrupted(monkeypatch, "finetune", 9, out=out, save_every_steps=5, **how)
    later = (out / "model.safetensors").read_bytes()
    best = iter([1.0, 1.0])
    train("finetune", options(out=out, resume="auto", **how))
    assert json.loads((out / "metrics.json").read_text())["selected"]["score"] == 3.0
    assert (out / "model.safetensors").read_bytes() != later


def test_a_snapshot_goes_on_in_another_folder(toy, tmp_path, monkeypatch):
    data, start = toy
    how = {"data": data, "start": start, **OFFICIAL}
    train("finetune", options(out=tmp_path / "alone", **how))
    one = tmp_path / "one"
    interrupted(monkeypatch, "finetune", 7, out=one, save_every_steps=3, **how)
    before = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    assert {p.parts[1] for p in before if len(p.parts) == 3} == {"step-00000003", "step-00000006"}
    train("finetune", options(out=tmp_path / "two", resume=str(one / "snapshots" / "step-00000003"), **how))
    check_same_run(tmp_path / "two", tmp_path / "alone")
    assert {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()} == before


def test_damaged_snapshots_are_named_and_passed_over(toy, tmp_path, monkeypatch, capsys):
    data, start = toy
    how = {"data": data, "start": start, **OFFICIAL}
    train("finetune", options(out=tmp_path / "alone", **how))
    out = tmp_path / "out"
    interrupted(monkeypatch, "finetune", 7, out=out, save_every_steps=2, **how)
    newest, _ = snapshot.found(out / "snapshots")
    whole = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    train("finetune", options(out=out, resume="auto", **how))
    said = capsys.readouterr().out
    assert f"passed over: {newest}: a damaged snapshot, optimizer.safetensors does not have its checksum" in said
    assert "goes on after step 4" in said
    check_same_run(out, tmp_path / "alone")
    other = tmp_path / "other"
    interrupted(monkeypatch, "finetune", 3, out=other, save_every_steps=2, **how)
    (only,) = snapshot.found(other / "snapshots")
    (only / "state.json").unlink()
    with pytest.raises(ValueError, match="holds no whole snapshot to go on from"):
        train("finetune", options(out=other, resume="auto", **how))
    assert only.is_dir(), "nothing is taken away"


def flags(stage: str, toy, out: Path, *more: str) -> list[str]:
    data, start = toy
    line = [stage, "--data", str(data), "--init", str(start), "--out", str(out), "--preset", "clevr", "--lr", "1e-2", "--coef-lr", "0.1"]
    usual = "--batch-size 2 --epochs 2 --device cpu --precision fp32 --workers 1 --seed 5 --resume auto --save-every-steps 2"
    return [*line, *usual.split(), *more]


def begun(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "runs.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def killed_and_resumed(toy, tmp_path, kills: int, draw: random.Random) -> None:
    """SIGKILLs at random moments, half of them inside a save; then the run goes on."""
    train("finetune", options(*toy, tmp_path / "alone", **OFFICIAL))
    died = 0
    for number in range(kills):
        out, inside = tmp_path / f"run-{number}", draw.random() < 0.5
        process = begun(flags("finetune", toy, out, *(["--in-save", str(draw.randint(1, 22))] if inside else [])))
        if not inside:
            while not out.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 3.0))
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said[-2000:]
        died += process.returncode != 0
        assert main(flags("finetune", toy, out)) == 0
        check_same_run(out, tmp_path / "alone")
        shutil.rmtree(out)
    assert died, "each came too late"


@pytest.mark.slow
def test_a_kill_inside_a_save(toy, tmp_path):
    train("finetune", options(*toy, tmp_path / "alone", **OFFICIAL))
    process = begun(flags("finetune", toy, tmp_path / "run", "--in-save", "8"))  # of five files, the third of the second snapshot
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said[-2000:]
    assert [p.name for p in snapshot.found(tmp_path / "run" / "snapshots")] == ["step-00000002"]
    assert main(flags("finetune", toy, tmp_path / "run")) == 0
    check_same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_kills_at_random_moments(toy, tmp_path):
    killed_and_resumed(toy, tmp_path, 4, random.Random(0))  # `python -m tests.faults --only kills` has hundreds
