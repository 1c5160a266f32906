"""A run that is interrupted and goes on ends where one left alone ends, to the last bit."""

import functools

import pytest
from runs import Killed, check_same_run, kill_after, left, options, train, world

from fastidc.train import judge
from fastidc.train.ledger import check_ledger

STEPS = 8


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return world(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def _no_meteor(monkeypatch):
    monkeypatch.setattr(judge, "score_by_subset", functools.partial(judge.score_by_subset, meteor=False))


def interrupted(monkeypatch, stage, after, **how) -> None:
    with monkeypatch.context() as patched:
        kill_after(patched, after)
        with pytest.raises(Killed):
            train(stage, options(**how))


def both(toy, tmp_path, monkeypatch, stage, afters, *, again=None, **how):
    """Each of several interrupted runs against one left alone."""
    data, start = toy
    how = {"data": data, "start": start, **how}
    train(stage, options(out=tmp_path / "alone", **how))
    for after in afters:
        out = tmp_path / f"after-{after}"
        every = 1 + after % 3
        interrupted(monkeypatch, stage, after, out=out, save_every_steps=every, **how)
        train(stage, options(out=out, resume="auto", save_every_steps=every, **{**how, **(again or {})}))
        check_same_run(out, tmp_path / "alone")
    return tmp_path / "alone"


def test_at_every_step_of_captioning(toy, tmp_path, monkeypatch):
    """Official optimiser, dropout; a snapshot every one, two or three steps."""
    alone = both(toy, tmp_path, monkeypatch, "finetune", range(1, STEPS + 1), preset="clevr", lr=1e-2, coef_lr=0.1)
    assert len(left(alone)["rows"]) == STEPS
    samples = [f"{n:06d}.png" for n in range(9)]
    assert check_ledger(alone / "ledger.jsonl", 2, 4, samples) == {"steps": 8, "epochs": 2, "samples": 16}
    assert not (alone / "snapshots").exists()
