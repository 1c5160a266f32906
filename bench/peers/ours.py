"""fastidc itself, driven as `fastidc.train.engine.Trainer` drives it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.peers.stepper import Stage
from fastidc import checkpoint
from fastidc.config import PRESETS, ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision


class OurStepper:
    """See `bench.peers.stepper.Stepper`. ``stop_early=False`` decodes the official evaluation's fixed number of raw steps."""

    def __init__(self, model: CLIP4IDC, stage: Stage, device: torch.device, precision: str, total_steps: int, stop_early: bool):
        recipe = getattr(PRESETS["clevr"], stage)
        self.precision = Precision(precision, device.type)
        self.model, self.device, self.stop_early = model, device, stop_early
        self.precision.prepare(model)
        self.optimizer = Optimizer(model, stage, recipe, total_steps, self.precision.scaler())
        self.trainer = Trainer(model, objectives(stage, recipe, ALONE), self.optimizer, ALONE, device, self.precision)

    def prepare(self, batch: PairBatch) -> PairBatch:
        return batch.to(self.device)

    def forward_backward(self, batch: PairBatch) -> Tensor:
        """The first half of ``Trainer.step``, which has no seam between its halves."""
        self.model.train()
        with self.precision.autocast():
            losses = self.model(batch, self.trainer.objectives)
            loss = torch.stack([o.weight * losses[o.name] for o in self.trainer.objectives]).sum()
        self.optimizer.scaler.scale(loss).backward()
        return loss.detach()

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def step(self, batch: PairBatch) -> Tensor:
        self.model.train()
        return self.trainer.step([batch])[0]

    def generate(self, batch: PairBatch, max_length: int = 32) -> Tensor:
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            tokens = self.model.encode_batch(batch.images)[1]
            ids = self.model.generate_from_tokens(tokens.flatten(0, 1), max_length, self.stop_early)[0]
        return ids.unflatten(0, tokens.shape[:2])


def build(
    config: ModelConfig,
    state: Mapping[str, Tensor] | None,
    stage: Stage,
    device: torch.device | str,
    compiled: bool = False,
    *,
    precision: str = "bf16",
    total_steps: int = 100_000,
    stop_early: bool = True,
) -> OurStepper:
    """``precision`` is one of `fastidc.train.precision.PRECISIONS`. fastidc compiles nothing, so ``compiled`` is refused."""
    if compiled:
        raise ValueError("fastidc is not run through torch.compile.")
    if stage == "adapt":
        config = config.replace(captioner_layers=0)
    device = torch.device(device)
    with device:
        model = CLIP4IDC(config)
    if state is not None:
        own = {name for name, _ in model.named_parameters()}
        weights = {name: tensor for name, tensor in checkpoint.from_official(state).items() if name in own}
        model.load_weights(weights, "the bench's state")
    return OurStepper(model, stage, device, precision, total_steps, stop_early)
