"""Snapshots on the disk: whole or none, verified, and never half of anything, whatever happens while one is written."""

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

from fastidc.errors import FastidcError
from fastidc.train import snapshot

STATE = {"step": 3, "epoch": 1, "best": None, "words": "é"}


def tensors(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "weights": {"a": torch.randn(7, 5, generator=g), "b.c": torch.randn(3, generator=g).half()},
        "random": {"cpu": torch.randint(0, 256, (64,), dtype=torch.uint8, generator=g)},
    }


def same(one: dict, other: dict) -> bool:
    return {file: set(values) for file, values in one.items()} == {file: set(values) for file, values in other.items()} and all(
        torch.equal(x, other[file][name]) and x.dtype == other[file][name].dtype
        for file, values in one.items()
        for name, x in values.items()
    )


def test_what_is_read_is_what_was_written(tmp_path):
    path = snapshot.write(tmp_path / "snapshots", 3, tensors(), STATE)
    assert path.name == "step-00000003"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "random.safetensors", "state.json", "weights.safetensors"]
    got = snapshot.read(path)
    assert same(got.tensors, tensors())
    assert got.state == STATE
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == [path.name]


def test_a_snapshot_of_the_same_step_is_replaced(tmp_path):
    snapshot.write(tmp_path, 3, tensors(), STATE)
    path = snapshot.write(tmp_path, 3, tensors(1), STATE | {"epoch": 2})
    assert same(snapshot.read(path).tensors, tensors(1))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_newest_that_verifies(tmp_path):
    for step in (5, 100, 99_999_999, 123_456_789, 20):
        snapshot.write(tmp_path, step, tensors(step), STATE | {"step": step})
    (tmp_path / "step-x").mkdir()
    assert [int(p.name[5:]) for p in snapshot.found(tmp_path)] == [123_456_789, 99_999_999, 100, 20, 5]
    said = []
    assert snapshot.newest(tmp_path, said.append).state["step"] == 123_456_789
    assert said == []
    for step in (123_456_789, 99_999_999):
        file = tmp_path / snapshot.name_of(step) / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    assert snapshot.newest(tmp_path, said.append).state["step"] == 100
    assert len(said) == 2
    assert "step-123456789: a damaged snapshot, weights.safetensors has" in said[0]
    assert snapshot.newest(tmp_path / "none") is None
    snapshot.prune(tmp_path, 2)
    assert [int(p.name[5:]) for p in snapshot.found(tmp_path)] == [123_456_789, 99_999_999]


def corrupted(path: Path, draw: random.Random) -> str:
    """One random damage to a snapshot, told."""
    file = draw.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "cut", "grow", "remove", "empty", "swap", "zero"])
    if kind == "flip":
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "grow":
        data += draw.randbytes(draw.randint(1, 50))
    elif kind == "empty":
        data = bytearray()
    elif kind == "zero":
        at = draw.randrange(len(data))
        part = data[at : at + 16]
        data[at : at + 16] = bytes(len(part)) if any(part) else b"\1" * len(part)
    elif kind == "swap":
        other = draw.choice([p for p in sorted(path.iterdir()) if p != file])
        data, swapped = bytearray(other.read_bytes()), bytes(data)
        other.write_bytes(swapped)
    if kind == "remove":
        file.unlink()
    else:
        file.write_bytes(data)
    return f"{kind} {file.name}"


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_is_loaded_silently(tmp_path, seed):
    """What still reads as before was changed in nothing but the manifest's blanks."""
    draw = random.Random(seed)
    whole = snapshot.write(tmp_path, 3, tensors(), STATE)
    for _ in range(75):
        broken = tmp_path / "broken" / whole.name
        shutil.copytree(whole, broken)
        what = corrupted(broken, draw)
        said = []
        got = snapshot.newest(broken.parent, said.append)
        if got is None:
            assert len(said) == 1, what
            assert str(broken) in said[0], what
            assert "\n" not in said[0], what
        else:
            assert same(got.tensors, tensors()), what
            assert got.state == STATE, what
            assert "manifest" in what
        shutil.rmtree(broken)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", ".hidden", "a/b.safetensors"])
def test_a_manifest_cannot_lead_outside(tmp_path, name):
    path = snapshot.write(tmp_path, 3, tensors(), STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FastidcError, match="which no snapshot holds"):
        snapshot.read(path)


def test_a_link_is_no_file_of_a_snapshot(tmp_path):
    path = snapshot.write(tmp_path, 3, tensors(), STATE)
    (path / "weights.safetensors").rename(tmp_path / "w")
    (path / "weights.safetensors").symlink_to(tmp_path / "w")
    with pytest.raises(FastidcError, match=r"weights.safetensors is missing"):
        snapshot.read(path)


def test_other_versions_and_names_are_refused(tmp_path):
    path = snapshot.write(tmp_path, 3, tensors(), STATE)
    shutil.copytree(path, tmp_path / "step-00000004")
    with pytest.raises(FastidcError, match="it says that it is of step 3"):
        snapshot.read(tmp_path / "step-00000004")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(FastidcError, match="is a snapshot of version 2, and this fastidc reads 1"):
        snapshot.read(path)


@pytest.mark.parametrize("at", ["_save_tensors", "_save_bytes", "digest", "sync_folder"])
def test_a_disk_that_is_full_leaves_the_earlier_ones(tmp_path, monkeypatch, at):
    before = snapshot.write(tmp_path, 3, tensors(), STATE)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot, at, full)
        with pytest.raises(FastidcError, match=r"step-00000004 cannot be written \(No space left on device\)"):
            snapshot.write(tmp_path, 4, tensors(1), STATE)
    assert same(snapshot.newest(tmp_path).tensors, tensors())
    assert [p.name for p in tmp_path.iterdir()] == [before.name]


def test_nothing_that_is_no_number_goes_into_a_state(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        snapshot.write(tmp_path, 4, tensors(), {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_writes_beside_and_says_what_failed(tmp_path, monkeypatch):
    seen = []
    writer = snapshot.Writer(tmp_path, 2, seen.append)
    for step in range(1, 5):
        writer.start(step, tensors(step), STATE | {"step": step})
    writer.wait()
    assert [p.name for p in seen] == [snapshot.name_of(step) for step in range(1, 5)]
    assert [int(p.name[5:]) for p in snapshot.found(tmp_path)] == [4, 3]
    monkeypatch.setattr(snapshot, "digest", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    writer.start(5, tensors(), STATE)
    with pytest.raises(FastidcError, match="step-00000005 cannot be written"):
        writer.start(6, tensors(), STATE)
    writer.wait()
    assert [int(p.name[5:]) for p in snapshot.found(tmp_path)] == [4, 3]


def test_what_is_staged_is_nobodys_view():
    whole = torch.arange(12.0).view(3, 4)
    given = {"a": whole.T, "b": whole[0]}
    copies = snapshot.staged(given)
    whole.zero_()
    assert torch.equal(copies["a"], torch.arange(12.0).view(3, 4).T)
    assert all(x.is_contiguous() for x in copies.values())
    assert torch.equal(copies["b"], torch.arange(4.0))


def test_a_kill_while_one_takes_the_place_of_another(tmp_path):
    """Between the two renames there is none under its name; the earlier one gets it back."""
    path = snapshot.write(tmp_path, 3, tensors(), STATE)
    path.rename(tmp_path / f".snapshot-old-{path.name}")
    (tmp_path / ".snapshot-17-abcd").mkdir()
    assert same(snapshot.newest(tmp_path).tensors, tensors())
    snapshot.write(tmp_path, 3, tensors(1), STATE)
    snapshot.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert same(snapshot.newest(tmp_path).tensors, tensors(1))


@pytest.mark.parametrize("links", [True, False])
def test_the_best_weights_are_those_of_the_moment(tmp_path, monkeypatch, links):
    """Although the file is replaced before the snapshot is written; and their bytes are verified like all others."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    model, folder = tmp_path / "model.safetensors", tmp_path / "snapshots"
    model.write_bytes(b"the best so far")
    taken = snapshot.beside(folder, model)
    (tmp_path / "new").write_bytes(b"a better one")
    (tmp_path / "new").replace(model)
    path = snapshot.write(folder, 3, tensors(), STATE, taken)
    assert (path / "best.safetensors").read_bytes() == b"the best so far"
    assert same(snapshot.read(path).tensors, tensors()), "not one of its tensors"
    assert [p.name for p in folder.iterdir()] == [path.name]
    (path / "best.safetensors").write_bytes(b"the best so fat")
    with pytest.raises(FastidcError, match="does not have its checksum"):
        snapshot.read(path)
    snapshot.beside(folder, model)
    snapshot.sweep(folder)
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_what_was_passed_over_is_set_aside(tmp_path):
    for step in (5, 99_999_999, 123_456_789):
        snapshot.write(tmp_path, step, tensors(), STATE)
    snapshot.set_aside(tmp_path, 5)
    assert [p.name for p in snapshot.found(tmp_path)] == ["step-00000005"]
    assert len(list(tmp_path.glob("passed-over-step-*"))) == 2


_WRITE_FOR_EVER = """
import sys, itertools, torch
from pathlib import Path
from fastidc.train import snapshot
for step in itertools.count(1):
    value = {"w": torch.full((200_000,), float(step))}
    snapshot.write(Path(sys.argv[1]), step, {"weights": value, "optimizer": value}, {"step": step})
    snapshot.prune(Path(sys.argv[1]), 2)
    print(step, flush=True)
"""


def killed_while_writing(folder: Path, kills: int, draw: random.Random) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", _WRITE_FOR_EVER, str(folder)], stdout=subprocess.PIPE, env=environment, text=True)
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        last = int((process.stdout.read().split() or ["1"])[-1])
        process.wait()
        said = []
        got = snapshot.newest(folder, said.append)
        assert said == [], "under its name a snapshot is whole"
        assert got.state["step"] >= last
        assert all(torch.equal(values["w"], torch.full((200_000,), float(got.state["step"]))) for values in got.tensors.values())
        snapshot.sweep(folder)
        assert {p.name for p in folder.iterdir()} == {p.name for p in snapshot.found(folder)}
        shutil.rmtree(folder)


def test_a_kill_leaves_whole_snapshots(tmp_path):
    killed_while_writing(tmp_path / "snapshots", 1, random.Random(0))


@pytest.mark.slow
def test_many_kills_leave_whole_snapshots(tmp_path):
    killed_while_writing(tmp_path / "snapshots", 8, random.Random(1))
