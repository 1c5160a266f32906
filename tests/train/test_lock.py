"""Two runs never write to one folder, and a run that is gone keeps nobody out."""

import errno
import fcntl
import json
import os
import shutil

import pytest
from runs import Killed, kill_after, left, options, train

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.errors import FastidcError
from fastidc.train.stage import StageRun
from fastidc.train.start import LOCK_FILE

OFFICIAL = {"preset": "clevr", "lr": 1e-2, "coef_lr": 0.1, "batch_size": 4, "epochs": 1}


def in_step(monkeypatch, step: int, do) -> None:
    original = StageRun.on_step

    def on_step(self, made) -> None:
        original(self, made)
        if made.number == step:
            monkeypatch.setattr(StageRun, "on_step", original)
            do()

    monkeypatch.setattr(StageRun, "on_step", on_step)


def test_the_second_of_two_runs_is_refused(toy, tmp_path, monkeypatch):
    """Whatever it wants of the folder; the first one ends as if nothing had been."""
    out, said = tmp_path / "out", []

    def second() -> None:
        for how in ({"resume": "auto"}, {"overwrite": True}, {}):
            with pytest.raises(FastidcError) as caught:
                train("adapt", options(*toy, out, **OFFICIAL, **how))
            said.append(str(caught.value))

    in_step(monkeypatch, 2, second)
    train("adapt", options(*toy, out, save_every_steps=1, **OFFICIAL))
    assert len(said) == 3
    for sentence in said:
        assert sentence.startswith(f"{out} is being made by process {os.getpid()} on ")
        assert sentence.endswith("wait until it is done, then run this again.")
    assert len(left(out)["rows"]) == 4
    assert not (out / LOCK_FILE).exists()


def test_what_a_killed_run_leaves_holds_nothing(toy, tmp_path, monkeypatch):
    """Also of another machine, on which Slurm had begun it."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(Killed):
            train("adapt", options(*toy, out, save_every_steps=1, **OFFICIAL))
    (out / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "another"}))
    train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    assert not (out / LOCK_FILE).exists()
    before = left(out)
    (out / LOCK_FILE).touch()  # killed between its last file and its end
    (out / "snapshots").mkdir()
    train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    assert left(out) == before


def test_a_file_system_without_locks(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *how: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    train("adapt", options(*toy, tmp_path / "out", **OFFICIAL))
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_what_is_refused_leaves_no_folder(toy, tmp_path, monkeypatch):
    with pytest.raises(FastidcError, match="holds no snapshot"):
        train("adapt", options(*toy, tmp_path / "out", resume=str(tmp_path / "none"), **OFFICIAL))
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(Killed):
            train("adapt", options(*toy, tmp_path / "early", **OFFICIAL))
    with pytest.raises(FastidcError, match=r"ended before its first snapshot; .* begin it anew with --resume auto or --overwrite"):
        train("adapt", options(*toy, tmp_path / "early", **OFFICIAL))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FastidcError, match="already exists and is not empty"):
        train("adapt", options(*toy, tmp_path / "file", **OFFICIAL))


def test_a_folder_that_is_taken_away(toy, tmp_path, monkeypatch):
    """Half a run is not written into a new one."""
    out = tmp_path / "out"
    in_step(monkeypatch, 2, lambda: out.rename(tmp_path / "away"))
    with pytest.raises(FastidcError, match=r"out: was taken away during the run; put it back"):
        train("adapt", options(*toy, out, save_every_steps=3, **OFFICIAL))
    assert not out.exists()
    (tmp_path / "away").rename(out)
    train("adapt", options(*toy, out, resume="auto", **OFFICIAL))
    in_step(monkeypatch, 2, lambda: (shutil.rmtree(tmp_path / "two"), (tmp_path / "two").mkdir()))
    with pytest.raises(FastidcError, match="was taken away during the run"):
        train("adapt", options(*toy, tmp_path / "two", **OFFICIAL))
