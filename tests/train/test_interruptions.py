"""Signals, full disks, broken numbers, other data: what a run does, what it says and with which code it ends."""

import json
import math
import os
import resource
import signal
import time

import pytest
import runs
import torch
from runs import check_same_run, kill_after, left, options, train

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.cli import main
from fastidc.errors import FastidcError, Interrupted, NotFiniteError
from fastidc.train import judge, signals, snapshot
from fastidc.train.engine import Trainer
from fastidc.train.ledger import check_ledger
from fastidc.train.stage import StageRun

OFFICIAL = {"preset": "clevr", "lr": 1e-2, "coef_lr": 0.1, "batch_size": 4}  # with 18 samples four steps an epoch
pytestmark = pytest.mark.usefixtures("runs_without_java")


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    """An adaptation that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    train("adapt", options(*toy, out, **OFFICIAL))
    return out


def after_step(monkeypatch, step: int, do) -> None:
    original = StageRun.on_step

    def on_step(self, made) -> None:
        if made.number == step:
            do()
        original(self, made)

    monkeypatch.setattr(StageRun, "on_step", on_step)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)], ids=["SIGTERM", "SIGINT", "preemption"]
)
def test_a_signal_finishes_the_step_and_saves(toy, alone, tmp_path, monkeypatch, capsys, number, code):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    line = [
        "adapt",
        "--data",
        str(toy[0]),
        "--init",
        str(toy[1]),
        "--out",
        str(out),
        "--preset",
        "clevr",
        "--lr",
        "1e-2",
        "--coef-lr",
        "0.1",
    ]
    line += [
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--workers",
        "1",
        "--seed",
        "5",
        "--preemption-signal",
        "SIGUSR1",
        "--resume",
        "auto",
    ]
    with monkeypatch.context() as patched:
        after_step(patched, 3, lambda: os.kill(os.getpid(), number))
        assert main(line) == code
    name = signal.Signals(number).name
    assert f"fastidc: {name} at step 3; go on with --resume auto from {out / 'snapshots' / 'step-00000003'}." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(line) == 0
    check_same_run(out, alone)
    assert main(line) == 0
    assert "the run is finished; there is nothing to resume." in capsys.readouterr().out
    check_same_run(out, alone)


@pytest.mark.parametrize("score", [1, 2, 3])
def test_a_signal_while_an_epoch_or_the_end_is_scored(toy, alone, tmp_path, monkeypatch, score):
    """It is left at once, and no step is made again."""
    out, calls, steps = tmp_path / "out", [], []
    original = judge.Judge.retrieval

    def retrieval(self, *args):
        calls.append(0)
        if len(calls) == score:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(judge.Judge, "retrieval", retrieval)
        with pytest.raises(Interrupted, match=rf"SIGTERM at step {(4, 8, 8)[score - 1]}; go on with --resume auto"):
            train("adapt", options(*toy, out, **OFFICIAL))
    trained = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batches: steps.append(0) or trained(self, batches))
    train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    assert len(steps) == (4, 0, 0)[score - 1]
    check_same_run(out, alone)


def test_a_second_signal_ends_at_once(monkeypatch):
    killed = []
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: killed.append(number))
    before = signal.getsignal(signal.SIGTERM)
    with signals.Signals() as caught:
        caught._caught(signal.SIGTERM, None)
        assert (caught.number, killed) == (signal.SIGTERM, [])
        caught._caught(signal.SIGTERM, None)
        assert killed == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with signals.Signals(shared=True) as caught:
        caught._caught(signal.SIGINT, None)
        caught._caught(signal.SIGTERM, None)
        assert len(killed) == 1, "torchrun passes on what this process has had"
        caught._since -= 10
        caught._caught(signal.SIGTERM, None)
        assert len(killed) == 2
    assert signal.getsignal(signal.SIGTERM) == before
    for name in ("SIGKILL", "SIGNOTHING", "SIG_DFL", "9"):
        with pytest.raises(FastidcError, match="name a signal that can be caught"):
            signals.check_signal(name)
    assert signals.check_signal("USR1") == signal.SIGUSR1


def test_other_settings_are_refused_and_named(toy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(runs.Killed):
            train("adapt", options(*toy, out, save_every_steps=2, **OFFICIAL))
    held = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def refused(**more) -> str:
        with pytest.raises(FastidcError) as caught:
            train(more.pop("stage", "adapt"), options(*more.pop("toy", toy), out, **{**OFFICIAL, "resume": "auto", **more}))
        return str(caught.value)

    assert "step-00000002: was written by a run with recipe lr 0.01, and this one has 0.02; resume with --lr 0.01, or begin" in refused(
        lr=0.02
    )
    assert "with recipe batch_size 4, and this one has 6; resume with --batch-size 4" in refused(batch_size=6)
    assert "with precision fp32, and this one has bf16; resume with --precision fp32" in refused(precision="bf16")
    assert "with recipe steps None, and this one has 5; resume without --steps" in refused(steps=5)
    assert "with stage adapt, and this one has finetune; resume with the command that it began with" in refused(stage="finetune")
    assert "holds an interrupted run; go on with --resume auto, choose another --out, or add --overwrite" in refused(resume="none")
    other = runs.worlds.clevr_tree(tmp_path / "other", {**runs.SPLITS, "train": [*range(8), 9]})
    assert "with data train 9 scenes, fingerprint" in (said := refused(toy=(other, toy[1])))
    assert "the data has changed: give the --data that it began with, or begin anew in another --out" in said
    assert f"{tmp_path / 'none'}: holds no snapshot; --resume takes a snapshot" in refused(resume=str(tmp_path / "none"))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == held
    for wrong in ({"keep": 0}, {"save_every_steps": 0}, {"save_every_minutes": -1.0}, {"nonfinite_steps": 0}):
        assert "must be at least" in refused(**wrong)
    assert "--watchdog must be a number of seconds above 0" in refused(watchdog=0.0)


@pytest.mark.parametrize(
    ("stage", "more", "sentence"),
    [
        ("finetune", {}, "a finished run with stage adapt, and this one has finetune"),
        ("adapt", {"lr": 0.5}, "with lr 0.01, and this one has 0.5"),
    ],
)
def test_a_finished_run_is_not_another_one(toy, alone, stage, more, sentence):
    before = left(alone)
    with pytest.raises(FastidcError, match=f"{sentence}; choose another --out"):
        train(stage, options(*toy, alone, resume="auto", **{**OFFICIAL, **more}))
    assert left(alone) == before


def test_what_auto_begins_anew(toy, alone, tmp_path, monkeypatch):
    """A folder that is not there, one that a run left before its first snapshot, one with nothing but a file that was being written."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(runs.Killed):
            train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    assert not snapshot.found(out / "snapshots")
    train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    check_same_run(out, alone)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FastidcError, match="choose another --out"):
            train("adapt", options(*toy, thesis, resume="auto", overwrite=overwrite, **OFFICIAL))
    assert (thesis / "chapter.txt").exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.json.7.tmp").write_text("{")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun's second attempt goes on although nobody said so
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(runs.Killed):
            train("adapt", options(*toy, tmp_path / "killed", save_every_steps=1, **OFFICIAL))
    train("adapt", options(*toy, tmp_path / "killed", **OFFICIAL))
    check_same_run(tmp_path / "killed", alone)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk(toy, alone, tmp_path, monkeypatch, capsys, policy):
    """From the second snapshot on: the first stays whole. The run stops, or trains to its end."""
    out, save = tmp_path / "out", snapshot._save_tensors

    def full(file, tensors):
        if "optimizer" in file.name and snapshot.found(out / "snapshots"):
            raise OSError(28, "No space left on device")
        save(file, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_save_tensors", full)
        how = options(*toy, out, save_every_steps=2, on_save_error=policy, **OFFICIAL)
        if policy == "continue":
            train("adapt", how)
            assert "No space left on device" in (said := capsys.readouterr().out)
            assert "Training goes on (--on-save-error continue)." in said
        else:
            with pytest.raises(FastidcError, match=r"cannot be written \(No space left on device\); what was saved before it is whole"):
                train("adapt", how)
            assert snapshot.newest(out / "snapshots").state["step"] == 2
            assert len(list((out / "snapshots").iterdir())) == 1
    if policy == "stop":
        train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    check_same_run(out, alone)


def test_a_file_that_may_not_grow(toy, tmp_path):
    """The system's own limit, as a quota is: no snapshot, one sentence, and what was written before is whole."""
    weights = (toy[1] / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights + 20_000, hard))  # fits the weights, not their two moments
    try:
        with pytest.raises(FastidcError, match=r"step-00000002 cannot be written \(.*File too large.*make room"):
            train("adapt", options(*toy, tmp_path / "out", save_every_steps=2, **{**OFFICIAL, "freeze_layers": -1}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out" / "snapshots").iterdir()) == []


def embedding_not_finite(monkeypatch, bad: set[int]) -> None:
    """Those steps' images become what is no number in the first block."""

    def hook(model) -> torch.utils.hooks.RemovableHandle:
        return model.pair_encoder.patch_embed.register_forward_hook(lambda module, given, x: torch.full_like(x, math.nan))

    not_finite(monkeypatch, bad, hook)


def of_gradient(model) -> torch.utils.hooks.RemovableHandle:
    return model.pair_encoder.projection.register_hook(lambda gradient: torch.full_like(gradient, math.nan))


def not_finite(monkeypatch, bad: set[int], hooked=of_gradient) -> None:
    """Those steps, counted over the life of the process, see what is no number."""
    count, original = [0], Trainer.step

    def step(self, batches):
        count[0] += 1
        if count[0] not in bad:
            return original(self, batches)
        hook = hooked(self.model)
        try:
            return original(self, batches)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainer, "step", step)


def test_numbers_that_are_not_finite(toy, tmp_path, monkeypatch):
    data, start = toy
    with monkeypatch.context() as patched:
        not_finite(patched, {3})
        with pytest.raises(NotFiniteError, match="not finite at step 3"):
            train("adapt", options(data, start, tmp_path / "stops", **OFFICIAL))
    rollback = {"on_nonfinite": "rollback", "nonfinite_steps": 2, "save_every_steps": 1}
    with monkeypatch.context() as patched:
        not_finite(patched, {3})
        train("adapt", options(data, start, tmp_path / "one", **OFFICIAL, **rollback))
    rows = left(tmp_path / "one")["rows"]
    assert [row.get("skipped") for row in rows] == [None, None, 1, *[None] * 5], "one is left out and counted"
    assert "rollbacks" not in json.loads((tmp_path / "one" / "metrics.json").read_text())
    with monkeypatch.context() as patched:
        not_finite(patched, {5, 6})
        train("adapt", options(data, start, tmp_path / "two", **OFFICIAL, **rollback))
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["rollbacks"] == [{"at": 6, "to": 4, "slowed": 0.5}]
    after = left(tmp_path / "two")["rows"]
    assert [row["step"] for row in after] == list(range(1, 9))
    factor = [x["lr"][0] / y["lr"][0] for x, y in zip(after[1:], rows[1:], strict=True)]  # the first rate is 0
    assert factor == pytest.approx([1.0] * 3 + [0.5] * 4)
    assert all(row["loss"] is not None and row["grad_norm"] is not None for row in after)
    assert check_ledger(tmp_path / "two" / "ledger.jsonl", 4, 4)["steps"] == 8
    with monkeypatch.context() as patched:  # killed after it went back: it knows
        not_finite(patched, {5, 6})
        kill_after(patched, 7)
        with pytest.raises(runs.Killed):
            train("adapt", options(data, start, tmp_path / "three", **OFFICIAL, **rollback))
    train("adapt", options(data, start, tmp_path / "three", resume="auto", **OFFICIAL, **rollback))
    check_same_run(tmp_path / "three", tmp_path / "two")
    with monkeypatch.context() as patched:  # an embedding that is no number is left out as a gradient is
        embedding_not_finite(patched, {3})
        train("adapt", options(data, start, tmp_path / "four", **OFFICIAL, **rollback))
    assert [row.get("skipped") for row in left(tmp_path / "four")["rows"]] == [None, None, 1, *[None] * 5]
    with monkeypatch.context() as patched:
        not_finite(patched, set(range(1, 999)))
        with pytest.raises(FastidcError, match="gone back 8 times already"):
            train("adapt", options(data, start, tmp_path / "never", **OFFICIAL, **rollback))
