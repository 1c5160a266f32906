"""What the tests of shadows share, also those of two processes: a training run of a small model, with shadows or without."""

import dataclasses

import torch
import worlds
from torch import Tensor

from fastidc.config import PRESETS
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.packed import PackedText
from fastidc.train.compiled import compile_captioner
from fastidc.train.distributed import ALONE, World
from fastidc.train.engine import Trainer
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision
from fastidc.train.shadows import Shadows

CONFIG = worlds.SMALL.replace(vision_layers=2, intra_layers=1, text_layers=1, captioner_layers=1, dropout=0.0)
CPU = torch.device("cpu")
BF16 = Precision("bf16", "cpu")


def recipe_of(stage: str, **changes):
    return dataclasses.replace(getattr(PRESETS["clevr"], stage), warmup=0.0, lr=1e-3, coef_lr=1.0, **changes)


def batch_of(stage: str, seed: int = 0, batch: int = 4) -> PairBatch:
    g = torch.Generator().manual_seed(seed)
    pairs = 1 if stage == "adapt" else 2
    images = torch.randint(0, 256, (batch, pairs + 1, 48, 48, 3), dtype=torch.uint8, generator=g)
    names = [str(i) for i in range(batch)]
    if stage == "adapt":
        words = [torch.randint(1, 100, (5 + i,), generator=g).tolist() for i in range(batch)]
        return PairBatch(images, names, text=PackedText.of([[*row, CONFIG.vocab_size - 1] for row in words]))
    ids = torch.randint(1, CONFIG.vocab_size, (batch, pairs, 1, 6), generator=g)
    targets = ids.roll(-1, -1)
    targets[1:, :, :, 4:] = 0
    return PairBatch(images, names, input_ids=ids, target_ids=targets)


class Run:
    """A small training run: with shadows or without, otherwise the same."""

    def __init__(
        self,
        stage: str,
        shadows: bool,
        precision: Precision = BF16,
        *,
        dropout: float = 0.0,
        half_gradients: bool = False,
        compiler: str = "",
        world: World = ALONE,
        reduce_dtype: torch.dtype | None = None,
        **changes,
    ):
        torch.manual_seed(0)
        self.stage, self.recipe = stage, recipe_of(stage, **changes)
        config = CONFIG.replace(dropout=dropout, **({"captioner_layers": 0} if stage == "adapt" else {}))
        self.model = CLIP4IDC(config).train()
        precision.prepare(self.model)
        if compiler:
            compile_captioner(self.model, backend=compiler)
        if shadows:
            self.model.shadows = Shadows(self.model, stage, precision.dtype, half_gradients=half_gradients)
        self.optimizer = Optimizer(self.model, stage, self.recipe, 10, precision.scaler())
        parts = (self.model, objectives(stage, self.recipe, world), self.optimizer, world, CPU, precision)
        self.trainer = Trainer(*parts, self.recipe.micro_batch, reduce_dtype=reduce_dtype)
        self.gradients: list[dict[str, Tensor]] = []
        update = self.optimizer.update

        def noting() -> Tensor:
            self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
            return update()

        self.optimizer.update = noting

    def step(self, number: int) -> list[Tensor]:
        """Loss and norm."""
        torch.manual_seed(100 + number)
        batches = [batch_of(self.stage, 10 * number + i) for i in range(self.recipe.accumulate)]
        return [x.detach().clone() for x in self.trainer.step(batches)]
