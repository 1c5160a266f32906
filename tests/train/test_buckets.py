"""Gradients averaged over processes: behind shadows, and in buckets of bf16."""

import pytest
import torch
from test_shared import ROOT, torchrun
from torch.utils._pytree import tree_leaves as leaves

from fastidc.errors import FastidcError
from fastidc.train import engine


@pytest.mark.slow
def test_gradients_over_two_processes(tmp_path):
    """DistributedDataParallel finds the masters' gradients behind the shadows; its buckets in bf16 bring what rounding leaves of them, the same
    to both processes."""
    done = torchrun(2, [str(ROOT / "tests/train/buckets.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name in ("gradients", "losses", "weights"):
        for a, b in zip(leaves(first["plain"][name]), leaves(first["shadows"][name]), strict=True):
            assert torch.equal(a, b), name
        for a, b in zip(leaves(first["bf16"][name]), leaves(second["bf16"][name]), strict=True):
            assert torch.equal(a, b) == (name != "losses"), name
    got, want = (first[name]["gradients"][0] for name in ("bf16", "plain"))
    for name, g in want.items():
        assert got[name].dtype == g.dtype
        assert (got[name] - g).norm() <= 2**-6 * g.norm() + 1e-7, name
    assert sum(not torch.equal(got[name], g) for name, g in want.items()) > 20, "nothing was rounded"


def test_buckets_in_another_dtype():
    with pytest.raises(FastidcError, match=r"in bf16 or as they are, not in torch.float16"):
        engine._compress(torch.float16)
