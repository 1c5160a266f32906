"""Parameters shared out among processes, and what a group's processes are told; two of them under torchrun, with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import SHORT

from fastidc import ops
from fastidc.config import TrainOptions
from fastidc.errors import FastidcError
from fastidc.train.official import main
from fastidc.train.run import train

ROOT = Path(__file__).parents[2]


def torchrun(count: int, arguments: list[str], timeout: int = 300) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def two(clevr, clip, tmp_path_factory):
    """The folder that two processes left, and what each of them was told."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun(2, [str(ROOT / "tests/train/shared.py"), str(clevr), str(clip), str(out)])
    assert done.returncode == 0, done.stderr[-5000:]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "parts"), [("whole", "parts"), ("captions", "captions-parts")])
def test_shared_out_parameters_train_alike(two, whole, parts):
    """Losses, norms, weights and scores of a run with DistributedDataParallel."""
    one, other = (two[0] / name for name in (whole, parts))
    assert len(steps(one)) >= 3
    for a, b in zip(steps(one), steps(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    moved = 0
    start = load_file(two[0] / "whole" / "model.safetensors")
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-3, atol=2e-5), key
        moved += key not in start or not torch.equal(a[key], start[key])
    assert moved or whole == "whole"
    a, b = (json.loads((folder / "metrics.json").read_text())["splits"]["test"] for folder in (one, other))
    assert a == b


@pytest.mark.slow
def test_what_a_group_is_told(two):
    for said, _ in two[1]:
        assert "--fsdp goes with --precision bf16 or fp32, not with fp16" in said[0]
        assert "--fsdp does not go with the optimiser muon" in said[1]
        assert "Process 1: The contrastive loss met a text embedding that is not finite, first in row 1 of its batch" in said[2]
        assert "Process 0: The contrastive loss met a pair embedding that is not finite, first in row 2 of process 1's batch" in said[2]
        assert said[2].count("met a pair embedding") == 1
        assert "the loss or its gradient is not finite at step 1; check the weights" in said[2]
        assert "text and pair must both be [B, E], B and E at least 1, got [3, 8] and [2, 8]" in said[3]
        assert "logit_scale must be one floating-point number" in said[4]
        assert "backend 'reference' of info_nce is for one process; over a group choose one of auto, triton, torch" in said[5]
        assert "pair must be [B, E], B and E at least 1, got [0, 8]" in said[6]
        assert "every rank of a group must give as many pairs of the same width, got [5, 8] by rank 0, [6, 8] by rank 1" in said[7]
        assert "every rank of a group must give as many pairs of the same width, got [4, 6] by rank 0, [6, 4] by rank 1" in said[8]
        assert "info_nce over a group has no gradient of a gradient" in said[9]
    assert not (two[0] / "refused").exists()


@pytest.mark.slow
def test_no_process_repeats_anothers_work_or_holds_all_scores(two):
    """256 rows each of 512: per process 4 of the loss's products of [256, 512] scores and [., 16] vectors, the least there are."""
    rows, everyone, width = 256, 512, 16
    for _, work in two[1]:
        assert work["torch"]["flops"] == 4 * 2 * rows * everyone * width
        assert work["torch"]["largest"] == rows * everyone
        assert work["triton"]["largest"] < rows * everyone / 2, "the kernels keep no scores at all"


def test_one_process_shares_out_nothing(clevr, clip, tmp_path):
    with pytest.raises(FastidcError, match="--fsdp shares the model out among processes, and there is one"):
        train("adapt", TrainOptions(data=clevr, out=tmp_path / "run", init=str(clip), intra_layers=2, fsdp=True, **SHORT))
    assert not (tmp_path / "run").exists()


def test_a_group_that_is_not_initialised():
    with pytest.raises(ValueError, match=r"torch\.distributed, which is not initialised; call init_process_group first"):
        ops.info_nce(torch.ones(2, 4), torch.ones(2, 4), torch.tensor(1.0), group="world")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_the_official_script_under_torchrun(count, clevr, clip, tmp_path):
    """The command of README, literally, with chunks; a run in this process, without, has the same losses."""
    flags = "--do_train --datatype clevr --batch_size 8 --epochs 2 --lr 1e-3 --coef_lr 1e-2 --intra_num_hidden_layers 2 --device cpu"
    flags += f" --precision fp32 --seed 3 --gather-grad full --data_path {clevr} --pretrained_clip_name {clip}"
    done = torchrun(count, ["-m", "fastidc.train", *flags.split(), "--micro-batch", "1", "--output_dir", str(tmp_path / "many")])
    assert done.returncode == 0, done.stderr[-5000:]
    assert main([*flags.split(), "--output_dir", str(tmp_path / "one")]) == 0
    many, one = ([step["loss"] for step in steps(tmp_path / name)] for name in ("many", "one"))
    assert len(one) >= 4
    assert many == pytest.approx(one, rel=1e-5)
    ranks = [json.loads((tmp_path / name / "metrics.json").read_text())["splits"]["test"]["strict"] for name in ("many", "one")]
    assert ranks[0] == ranks[1]
