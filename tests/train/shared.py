"""What each of two processes does for test_shared.py; torchrun starts it. Arguments: data, CLIP, out."""

import functools
import json
import sys
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastidc import ops
from fastidc.config import TrainOptions
from fastidc.train import judge
from fastidc.train.distributed import World, processes
from fastidc.train.run import train
from fastidc.train.steplog import StepLog

SHORT = {"preset": "clevr", "batch_size": 8, "lr": 1e-3, "coef_lr": 1e-2, "precision": "fp32", "device": "cpu", "seed": 3, "workers": 1}


def adapt(data: Path, clip: Path, out: Path, **more) -> dict:
    return train("adapt", TrainOptions(data=data, init=str(clip), intra_layers=2, epochs=1, out=out, **SHORT, **more))


def finetune(data: Path, init: Path, out: Path, **more) -> dict:
    """A captioning loss is each process's own mean, so only the mean over all is that of one process; and of one dropout."""
    return train("finetune", TrainOptions(data=data, init=str(init), steps=3, out=out, token_mean="global", **SHORT, **more))


def refused(run) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def not_finite(world: World, out: Path) -> str:
    """A text of the second process and a pair of its last row: what both processes are told when they log."""
    log = StepLog(out / "log.jsonl", world)
    text, pair = torch.ones(3, 8), torch.ones(3, 8)
    if world.rank == 1:
        text[1, 4], pair[2, 0] = torch.nan, torch.inf
    loss = ops.info_nce(text, pair, torch.tensor(1.0), group=world.group)
    log.add({"step": 1, "lr": [0.0]}, loss, loss)
    return refused(log.flush)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that anything makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def work(world: World, backend: str) -> dict:
    """Floating-point operations of products, and the largest tensor, of a loss and its gradients over 256 rows of each process."""
    given = [torch.randn(256, 16, requires_grad=True), torch.randn(256, 16, requires_grad=True), torch.tensor(1.0, requires_grad=True)]
    with Largest() as largest, FlopCounterMode(display=False) as counter:
        ops.info_nce(*given, group=world.group, backend=backend).backward()
    return {"flops": counter.get_total_flops(), "largest": largest.numbers}


def twice(world: World) -> None:
    """A gradient of a gradient over a group, which would lack the other processes' part."""
    text = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.info_nce(text, torch.randn(3, 8), torch.tensor(1.0), group=world.group), text, create_graph=True)
    gradient.square().sum().backward()


def run() -> None:
    data, clip, out = map(Path, sys.argv[1:])
    judge.score_by_subset = functools.partial(judge.score_by_subset, meteor=False)  # its process takes seconds to start
    with processes("cpu") as (world, _):  # torchrun's store allows one group a process, so every run below uses this one
        adapt(data, clip, out / "whole")
        adapt(data, clip, out / "parts", fsdp=True)
        finetune(data, out / "whole", out / "captions")
        finetune(data, out / "whole", out / "captions-parts", fsdp=True)
        folder = out / "refused"
        said = [
            refused(
                lambda: train("adapt", TrainOptions(data=data, out=folder, init=str(clip), fsdp=True, **{**SHORT, "precision": "fp16"}))
            ),
            refused(lambda: train("adapt", TrainOptions(data=data, out=folder, fsdp=True, **{**SHORT, "preset": "tiny"}))),
            not_finite(world, out),
            refused(lambda: ops.info_nce(torch.ones(3, 8), torch.ones(2, 8), torch.tensor(1.0), group=world.group)),
            refused(lambda: ops.info_nce(torch.ones(3, 8), torch.ones(3, 8), torch.ones(1), group=world.group)),
            refused(lambda: ops.info_nce(torch.ones(3, 8), torch.ones(3, 8), torch.tensor(1.0), group=world.group, backend="reference")),
            refused(lambda: ops.start_gather(torch.ones(0, 8), world.group)),
            refused(lambda: ops.start_gather(torch.ones(5 + world.rank, 8), world.group)),
            refused(lambda: ops.start_gather(torch.ones(*((4, 6), (6, 4))[world.rank]), world.group)),
            refused(lambda: twice(world)),
        ]
        facts = said, {backend: work(world, backend) for backend in ("torch", "triton")}
    (out / f"rank{world.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run()
