"""fastidc itself, driven as `fastidc.train.engine.Trainer` drives it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bench.peers.stepper import Stage
from fastidc import checkpoint
from fastidc.config import PRESETS, ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.train.compiled import Choice, compile_captioner, policy
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision


class OurStepper:
    """See `bench.peers.stepper.Stepper`; the options are those of `build`."""

    def __init__(
        self,
        model: CLIP4IDC,
        stage: Stage,
        device: torch.device,
        precision: str,
        total_steps: int,
        stop_early: bool,
        all_tokens: bool,
        shared: bool,
        packed: bool,
        backends: str,
        compiling: Choice,
    ):
        recipe = getattr(PRESETS["clevr"], stage)
        self.precision = Precision(precision, device.type)
        self.model, self.device, self.stop_early, self.shared, self.packed, self.backends = (
            model,
            device,
            stop_early,
            shared,
            packed,
            backends,
        )
        self.precision.prepare(model)
        if policy(compiling, stage, device.type, fsdp=False).compiled:
            compile_captioner(model)
        self.optimizer = Optimizer(model, stage, recipe, total_steps, self.precision.scaler())
        wanted = objectives(stage, recipe, ALONE)
        if all_tokens:
            wanted = tuple(replace(objective, reads_tokens=True) for objective in wanted)
        self.trainer = Trainer(model, wanted, self.optimizer, ALONE, device, self.precision)

    def prepare(self, batch: PairBatch) -> PairBatch:
        batch = batch if self.shared else independent(batch)
        if not self.packed and batch.text is not None:
            batch = replace(batch, text=batch.text.padded())  # the model takes either
        return batch.to(self.device)

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """The context in which its ops take the backends that it was built with."""
        before = os.environ.get("FASTIDC_BACKEND")
        if self.backends:
            os.environ["FASTIDC_BACKEND"] = self.backends
        try:
            yield
        finally:
            if self.backends and before is None:
                del os.environ["FASTIDC_BACKEND"]
            elif self.backends:
                os.environ["FASTIDC_BACKEND"] = before

    def forward_backward(self, batch: PairBatch) -> Tensor:
        """The first half of ``Trainer.step``, which has no seam between its halves."""
        self.model.train()
        with self.chosen(), self.precision.autocast():
            losses = self.model(batch, self.trainer.objectives)
            loss = torch.stack([o.weight * losses[o.name] for o in self.trainer.objectives]).sum()
        with self.chosen():
            self.optimizer.scaler.scale(loss).backward()
        return loss.detach()

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def step(self, batch: PairBatch) -> Tensor:
        self.model.train()
        with self.chosen():
            return self.trainer.step([batch])[0]

    def generate(self, batch: PairBatch, max_length: int = 32) -> Tensor:
        self.model.eval()
        with self.chosen(), torch.no_grad(), self.precision.autocast():
            tokens = self.model.encode_batch(batch.images)[1]
            ids = self.model.generate_from_tokens(tokens.flatten(0, 1), max_length, stop_early=self.stop_early)[0]
        return ids.unflatten(0, tokens.shape[:2])


def independent(batch: PairBatch) -> PairBatch:
    """[B, 1 + P, ...] samples -> B * P pairs that share nothing, each with a before-image of its own; captioning's batch."""
    others = batch.images[:, 1:]
    images = torch.stack([batch.images[:, :1].expand_as(others), others], dim=2).flatten(0, 1)
    ids = {name: getattr(batch, name).flatten(0, 1)[:, None] for name in ("input_ids", "target_ids")}
    return replace(batch, images=images, ids=[f"{name}/{i}" for name in batch.ids for i in range(others.shape[1])], **ids)


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
    all_tokens: bool = False,
    shared: bool = True,
    packed: bool = True,
    backends: str = "",
    compiling: Choice = "auto",
) -> OurStepper:
    """``precision`` is one of `fastidc.train.precision.PRECISIONS`. What fastidc compiles it decides itself, so ``compiled`` is refused.

    ``stop_early=False`` decodes the official evaluation's fixed number of raw steps. What follows takes something away, for the waterfall:
    ``all_tokens`` computes every token of the last inter layer where two are read, ``shared=False`` encodes the before-image once for each
    of its pairs, ``packed=False`` gives the text tower captions padded to one length, ``backends`` is what FASTIDC_BACKEND says while this stepper runs,
    ``compiling`` what ``--compile`` says.
    """
    if compiled:
        raise ValueError("fastidc is not run through torch.compile as a whole.")
    if stage == "adapt":
        config = config.replace(captioner_layers=0)
    device = torch.device(device)
    with device:
        model = CLIP4IDC(config)
    if state is not None:
        own = {name for name, _ in model.named_parameters()}
        weights = {name: tensor for name, tensor in checkpoint.from_official(state).items() if name in own}
        model.load_weights(weights, "the bench's state")
    return OurStepper(model, stage, device, precision, total_steps, stop_early, all_tokens, shared, packed, backends, compiling)
