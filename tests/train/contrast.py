"""The gradient of one adaptation step, by one process or by many: test_contrast.py calls it, and starts it under torchrun."""

import os
import sys
from pathlib import Path

import torch
import worlds
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastidc.config import PRESETS
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.packed import PackedText
from fastidc.train import shards
from fastidc.train.distributed import ALONE, World, processes
from fastidc.train.engine import Trainer
from fastidc.train.objectives import Adaptation
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision

SAMPLES = 12


def whole_batch() -> PairBatch:
    """12 pairs with captions of different lengths."""
    g, config = torch.Generator().manual_seed(3), worlds.SMALL
    lengths = torch.randint(0, 9, (SAMPLES,), generator=g).tolist()
    captions = [[config.start_id, *torch.randint(1, config.vocab_size - 2, (n,), generator=g).tolist(), config.end_id] for n in lengths]
    images = torch.randint(0, 256, (SAMPLES, 2, config.image_size, config.image_size, 3), generator=g, dtype=torch.uint8)
    return PairBatch(images, [str(i) for i in range(SAMPLES)], text=PackedText.of(captions))


def gradients(
    world: World, gather_grad: str, micro_batch: int | None, dtype: torch.dtype = torch.float64, fsdp: bool = False, batches: int = 1
) -> dict[str, torch.Tensor]:
    """The loss of the whole batch and every parameter's gradient, as a step of `Trainer` leaves them to its optimiser; in ``batches``
    it is made of so many, each with a loss of its own."""
    torch.manual_seed(0)
    model = CLIP4IDC(worlds.SMALL.replace(captioner_layers=0)).to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    if fsdp:
        shards.shard(model, world, torch.device("cpu"))
    recipe = PRESETS["clevr"].adapt
    optimizer = Optimizer(model, "adapt", recipe, 10)
    task = (Adaptation(world=world, gather_grad=gather_grad),)
    trainer = Trainer(model, task, optimizer, world, torch.device("cpu"), Precision("fp32", "cpu"), micro_batch)
    found: dict[str, torch.Tensor] = {}

    def noted() -> torch.Tensor:
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        assert sum(isinstance(m, FSDPModule) for m in model.modules()) == (1 + 3 + 2) * fsdp, "the model and each of its blocks"
        assert any(isinstance(p, DTensor) for p in model.parameters()) == fsdp
        return torch.zeros(())

    optimizer.update = noted
    own = SAMPLES // world.size // batches
    parts = list(whole_batch().chunks(own))
    loss, _ = trainer.step(parts[world.rank * batches : (world.rank + 1) * batches])
    return {"loss": loss, **found}


def run(out: Path) -> None:
    """Both backends, both modes, whole and in chunks, with parameters whole and shared out."""
    with processes("cpu") as (world, _):
        found = {}
        for backend in ("torch", "triton"):
            os.environ["FASTIDC_BACKEND"] = f"info_nce={backend}"
            for mode in ("full", "local"):
                for micro in (None, 2):
                    found[backend, mode, micro, False] = gradients(world, mode, micro)
        os.environ["FASTIDC_BACKEND"] = ""
        for mode, micro in (("full", None), ("full", 2), ("local", None)):
            found["torch", mode, micro, True] = gradients(world, mode, micro, fsdp=True)
        if world.is_main:
            torch.save(found, out)


if __name__ == "__main__":
    run(Path(sys.argv[1])) if len(sys.argv) > 1 else gradients(ALONE, "full", None)
