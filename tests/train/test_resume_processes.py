"""Runs of two processes that are interrupted, and go on as two or as one; under torchrun, with gloo."""

import json
import shutil

import pytest
import runs
import torch
from resumed import OFFICIAL
from runs import check_same_run, options, train
from safetensors.torch import load_file
from test_shared import ROOT, steps, torchrun

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.train import snapshot
from fastidc.train.ledger import check_ledger

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("runs_without_java")]


@pytest.fixture(scope="module")
def two(toy, tmp_path_factory):
    """The folder that two processes left, and what each was told."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patched:
        runs.kill_after(patched, 3)
        for name in ("one-two", "one-shared"):
            with pytest.raises(runs.Killed):
                train("adapt", options(*toy, out / name, save_every_steps=2, **OFFICIAL))
    done = torchrun(2, [str(ROOT / "tests/train/resumed.py"), *map(str, toy), str(out)])
    assert done.returncode == 0, done.stderr[-5000:]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """The same adaptation by one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("one") / "alone"
    train("adapt", options(*toy, out, **OFFICIAL))
    return out


@pytest.mark.parametrize("name", ["ddp", "fsdp", "captions"])
def test_two_go_on_as_two(two, name):
    """To the last bit; every process's dropout too."""
    check_same_run(two[0] / f"{name}-again", two[0] / name)


def check_alike(folder, one) -> None:
    """The tolerances of test_shared.py, and every sample once an epoch."""
    for a, b in zip(steps(one), steps(folder), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    a, b = (load_file(path / "model.safetensors") for path in (one, folder))
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-3, atol=2e-5), key
    assert check_ledger(folder / "ledger.jsonl", 4, 4) == {"steps": 8, "epochs": 2, "samples": 32}
    assert (folder / "ledger.jsonl").read_bytes() == (one / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-two", "one-shared"])
def test_one_goes_on_as_two(two, one, name):
    check_alike(two[0] / name, one)


@pytest.mark.parametrize("name", ["two-one", "shared-one"])
def test_two_go_on_as_one(two, one, toy, tmp_path, name):
    shutil.copytree(two[0] / name, tmp_path / name)
    assert snapshot.newest(tmp_path / name / "snapshots").state["processes"] == 2
    train("adapt", options(*toy, tmp_path / name, resume="auto", **OFFICIAL))
    check_alike(tmp_path / name, one)


def test_a_signal_to_one_process_ends_both_after_the_same_step(two):
    told = two[1]
    assert told[0] == told[1]
    sentence, code = told[0]
    assert code == 143
    assert sentence.startswith("SIGTERM at step 4; go on with --resume auto")
    check_same_run(two[0] / "stopped", two[0] / "ddp")


def test_torchrun_starts_a_killed_process_again(two, toy, tmp_path):
    """The second process is killed in the first attempt; the second attempt goes on by itself."""
    line = ["adapt", "--data", str(toy[0]), "--init", str(toy[1]), "--out", str(tmp_path / "run"), "--preset", "clevr", "--lr", "1e-2"]
    line += [
        "--coef-lr",
        "0.1",
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
        "--save-every-steps",
        "2",
    ]
    done = torchrun(2, ["--max-restarts=1", str(ROOT / "tests/train/dying.py"), *line])
    assert done.returncode == 0, done.stderr[-5000:]
    assert "goes on after step" in done.stdout
    check_same_run(tmp_path / "run", two[0] / "ddp")
