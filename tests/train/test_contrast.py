"""Adaptation's gradient: the same for one process and many, for a whole batch and for chunks of it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import compare
import contrast
import pytest
import torch
import worlds
from torch import distributed as dist

from fastidc import ops
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import Linear
from fastidc.train.distributed import ALONE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone():
    return contrast.gradients(ALONE, "full", None)


@pytest.mark.parametrize("micro_batch", [1, 5, 11, 12, 100])
def test_chunks_are_the_whole_batch(alone, micro_batch):
    found = contrast.gradients(ALONE, "full", micro_batch)
    assert set(found) == set(alone)
    assert len(found) > 30
    for name, want in alone.items():
        compare.assert_close(found[name], want, 1e-9 if "qkv.bias" in name else 1e-10, name)  # keys' biases have a true gradient of 0


def test_chunks_of_accumulated_batches():
    whole, chunked = (contrast.gradients(ALONE, "full", micro, batches=2) for micro in (None, 4))
    for name, want in whole.items():
        compare.assert_close(chunked[name], want, 1e-9 if "qkv.bias" in name else 1e-10, name)


def test_pairs_travel_while_texts_are_encoded_and_the_loss_leaves_autocast(monkeypatch):
    """Over a group of one process, in bf16: the gather starts before the text tower, and the loss is that of fp32 products."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model, batch, order = CLIP4IDC(worlds.SMALL.replace(captioner_layers=0)), contrast.whole_batch(), []
        gather, encode = ops.start_gather, model.text_encoder.forward
        monkeypatch.setattr(ops, "start_gather", lambda *x: (order.append("gather"), gather(*x))[1])
        monkeypatch.setattr(model.text_encoder, "forward", lambda *x: (order.append("text"), encode(*x))[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pair = model.encode_batch(batch.images, False)[0][:, 0]
            loss = model.text_pair_loss(pair, batch.text, group=dist.group.WORLD)
            text = model.encode_text(batch.text)
        assert order[:2] == ["gather", "text"]
        compare.assert_close(loss, ops.info_nce(text.float(), pair.float(), model.logit_scale), 1e-6)
    finally:
        dist.destroy_process_group()


def test_chunks_in_single_precision():
    whole, chunked = (contrast.gradients(ALONE, "full", micro, torch.float32) for micro in (None, 5))
    total = sum(float(g.norm()) ** 2 for name, g in whole.items() if name != "loss") ** 0.5
    for name, want in whole.items():
        assert float((chunked[name] - want).norm()) <= 5e-6 * max(float(want.norm()), 1e-2 * total), name


def test_only_a_chunk_has_activations(monkeypatch):
    """With gradients on, no more samples pass than a chunk has."""
    seen = []
    original = Linear.forward

    def forward(self, x):
        if torch.is_grad_enabled():
            seen.append(x.shape[0])
        return original(self, x)

    monkeypatch.setattr(Linear, "forward", forward)
    contrast.gradients(ALONE, "full", 2)
    chunked = max(seen)
    seen.clear()
    contrast.gradients(ALONE, "full", None)
    assert max(seen) >= 4 * chunked


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_processes_are_one(alone, size, tmp_path):
    """ "full": loss and every gradient of one process with the whole batch. "local": towers' gradients divided by the number of processes,
    the temperature's not (clip4idc.md 4). By both backends, in chunks, and with parameters shared out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    script = [str(ROOT / "tests/train/contrast.py"), str(tmp_path / "found.pt")]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (backend, mode, micro, fsdp), found in torch.load(tmp_path / "found.pt", weights_only=True).items():
        assert set(found) == set(alone)
        for name, want in alone.items():
            factor = 1 if mode == "full" or name in ("loss", "logit_scale") else 1 / size
            compare.assert_close(
                found[name],
                factor * want,
                1e-8 if "qkv.bias" in name else 1e-10,
                f"{name}: {backend}, {mode}, chunks of {micro}, fsdp {fsdp}",
            )


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_ends_the_others(dies):
    """With a sentence and at once, rather than in the hours that a process may wait for one that scores captions."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared["MASTER_PORT"] = str(found.getsockname()[1])
    script = [sys.executable, str(ROOT / "tests/train/lonely.py"), str(dies)]
    both = [subprocess.Popen(script, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate(timeout=60)[1] for process in both]
    left = 1 - dies
    assert both[dies].returncode == -signal.SIGKILL
    assert both[left].returncode == 2, said[left]
    assert f"process {left} of 2 lost another one" in said[left]
    assert "Traceback" not in said[left]
