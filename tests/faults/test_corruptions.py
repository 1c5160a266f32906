"""Snapshots spoilt at random, see `faults.corruptions`."""

import pytest
import torch
from safetensors.torch import save_file

from fastidc.train import progress, snapshot
from tests.faults import corruptions


def judge(found: dict) -> None:
    assert found["silent"] == []
    assert found["crashed"] == []
    assert found["unnamed"] == []
    assert found["refused"] + found["harmless"] == found["cases"]
    assert found["refused"] > 0.9 * found["cases"], "the dice must have spoilt something"


def test_no_spoilt_snapshot_is_loaded_silently():
    judge(corruptions.run(0, 50))


@pytest.mark.slow
def test_no_spoilt_snapshot_is_loaded_silently_in_a_thousand():
    found = corruptions.run(1, 1000)
    judge(found)
    assert set(found["kinds"]) == set(corruptions.DAMAGES)


def test_a_whole_snapshot_is_taken_up(tmp_path):
    path = corruptions.whole(tmp_path)
    into = corruptions.session(1)
    assert corruptions.taken_up(path, into).state["step"] == corruptions.STEP
    theirs, ours = dict(corruptions.session(0).model.named_parameters()), dict(into.model.named_parameters())
    assert all(torch.equal(x, ours[name]) for name, x in theirs.items())
    assert into.optimizer.steps == corruptions.STEP


def test_what_is_loaded_silently_is_seen(monkeypatch):
    """Without checksums, and with a weight that nobody compares, the summary says so."""
    monkeypatch.setattr(snapshot, "digest", lambda path: "")
    monkeypatch.setattr(snapshot, "_check_file", lambda *args: None)
    monkeypatch.setattr(progress, "_check", lambda *args: None)
    monkeypatch.setattr(progress, "put_back", lambda *args: None)

    def damage(path, draw):
        save_file({"w": torch.zeros(2)}, path / "weights.safetensors")
        return "weights"

    monkeypatch.setattr(corruptions, "DAMAGES", {"other": damage})
    assert len(corruptions.run(0, 2)["silent"]) == 2
