"""Two processes under torchrun, with gloo, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import worlds

from fastidc import ops
from fastidc.train.official import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A checkpoint of the first stage, at random."""
    path = tmp_path_factory.mktemp("first") / "pytorch_model.bin.0"
    torch.save(worlds.official_state(worlds.DROP_IN, "adapt", seed=5), path)
    return path


@pytest.fixture(scope="module")
def two(clevr, clip, adapted, tmp_path_factory):
    """The folder that two processes left, and what each of them noted."""
    out = tmp_path_factory.mktemp("two")
    decoder = worlds.decoder_folder(out / "decoder", dropout=0.0)
    arguments = [str(path) for path in (clevr, clip, adapted, decoder, out)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "tests/train/processes.py"),
        *arguments,
    ]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)], done.stderr


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_run_of_both_processes_ends_as_it_should(two):
    _, facts, stderr = two
    assert facts[0]["codes"] == facts[1]["codes"] == [0, 0, 0, 2, 0]
    assert stderr.count("a batch of 7 cannot be shared out evenly: 2 processes") == 1, "of two processes one speaks"
    assert not facts[0]["initialised"], "no process group is left behind"


def test_world(two):
    _, facts, _ = two
    for rank, fact in enumerate(facts):
        assert fact["talk"] == [
            list(range(7)) if rank == 0 else None,
            "from 0",
            0,
            "refused on the first",
            ["FastidcError", "ZeroDivisionError"][rank == 0],
        ]


def test_info_nce_over_processes(two):
    """full: the gradients of one process. local: the official outcome, towers' halved at two processes, logit_scale's not."""
    text, pair, scale = processes.loss_inputs()
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    scale.requires_grad_()
    loss = ops.info_nce(text @ weight, pair @ weight, scale)
    loss.backward()
    _, facts, _ = two
    for fact in facts:
        for mode, factor in (("full", 1.0), ("local", 0.5)):
            got_loss, got_weight, got_scale = fact["gradients"][mode]
            assert got_loss == pytest.approx(loss.item(), rel=1e-12)
            assert torch.allclose(torch.tensor(got_weight, dtype=torch.float64), factor * weight.grad, rtol=1e-10, atol=1e-14)
            assert got_scale == pytest.approx(scale.grad.item(), rel=1e-10)


def test_the_samples_of_a_step_are_shared_out_and_none_is_read_twice(two):
    _, facts, _ = two
    first, second = (fact["ids"] for fact in facts)
    assert {len(batch) for batch in first + second} == {4}
    epoch = len(first) // 3
    for start in range(0, 3 * epoch, epoch):
        read = [name for batch in first[start : start + epoch] + second[start : start + epoch] for name in batch]
        assert len(read) == len(set(read))


def check_against_one_process(two_folder, one_folder):
    one, two = losses(one_folder), losses(two_folder)
    assert len(one) >= 20
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    last = max(one_folder.glob("pytorch_model.bin.*"))
    a, b = (torch.load(folder / last.name, weights_only=True) for folder in (one_folder, two_folder))
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-3, atol=2e-5), key


def test_retrieval_losses_are_those_of_one_process(two, clevr, clip, tmp_path):
    flags = [*processes.RETRIEVAL.split(), "--epochs", "3", "--data_path", str(clevr), "--pretrained_clip_name", str(clip)]
    assert main([*flags, "--gather-grad", "full", "--output_dir", str(tmp_path)]) == 0
    check_against_one_process(two[0] / "retrieval", tmp_path)
    # and the evaluation that both processes share finds the same ranks
    metrics = [json.loads((folder / "metrics.json").read_text())["splits"]["test"]["strict"] for folder in (tmp_path, two[0] / "retrieval")]
    assert metrics[0] == metrics[1]


@pytest.mark.usefixtures("no_meteor")
def test_captioning_losses_are_those_of_one_process_with_a_global_token_mean(two, clevr, adapted, tmp_path):
    flags = [
        *processes.RETRIEVAL.split(),
        "--task_type",
        "caption",
        "--epochs",
        "7",
        "--data_path",
        str(clevr),
        "--init_model",
        str(adapted),
    ]
    decoder = two[0] / "decoder"
    assert main([*flags, "--decoder_model", str(decoder), "--token-mean", "global", "--output_dir", str(tmp_path)]) == 0
    check_against_one_process(two[0] / "caption", tmp_path)
    assert (two[0] / "caption" / "hyp_ep_eval.json").read_bytes() == (tmp_path / "hyp_ep_eval.json").read_bytes()


def test_both_processes_stop_early_together(two):
    """One best epoch and eleven worse ones; the other process would wait for ever in the next step's all-reduce otherwise."""
    assert len(list((two[0] / "stopped").glob("pytorch_model.bin.*"))) == 12
