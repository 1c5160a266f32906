"""What each of two processes does for test_buckets.py; torchrun starts it. Argument: where to leave the gradients."""

import sys
from pathlib import Path

import torch
from shadow_cases import Run

from fastidc.train.distributed import processes


def run() -> None:
    out = Path(sys.argv[1])
    with processes("cpu") as (world, _):
        found = {}
        for name, shadows, dtype in (("plain", False, None), ("shadows", True, None), ("bf16", True, torch.bfloat16)):
            one = Run("finetune", shadows, world=world, reduce_dtype=dtype)
            losses = [one.step(10 * world.rank + number)[0] for number in range(2)]
            found[name] = {"gradients": one.gradients, "losses": losses, "weights": dict(one.model.state_dict())}
        torch.save(found, out / f"rank{world.rank}.pt")


if __name__ == "__main__":
    run()
