"""Peer B: the idiomatic baseline of 2026.

SDPA, bf16 autocast over fp32 weights, torch.compile, one fused AdamW, captions padded to a static 32 tokens, full logits. Decoding has a
static KV cache; compiled, its step is a CUDA graph ("reduce-overhead") and the encoders before it are eager, as in most people's `generate`.
What trains, at which rates, is fastidc's (`parameter_groups`), so that a step updates the same parameters.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers.idiomatic_model import Model
from bench.peers.stepper import Stage
from fastidc import checkpoint
from fastidc.config import PAD_ID, PRESETS, ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.train.optim import parameter_groups, schedule

MAX_WORDS = 32


@dataclass(frozen=True)
class PaddedBatch(PairBatch):
    """A batch on its device, every caption padded to one length."""

    text_ids: Tensor | None = None  # int64 [B, L]


class IdiomaticStepper:
    """See `bench.peers.stepper.Stepper`."""

    def __init__(self, model: Model, stage: Stage, device: torch.device, precision: str, total_steps: int, compiled: bool, mode: str):
        recipe = getattr(PRESETS["clevr"], stage)
        self.model, self.stage, self.device, self.precision = model, stage, device, precision
        groups = parameter_groups(model, stage, recipe)
        self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(recipe, total_steps))
        self.clip_norm = recipe.clip_norm
        loss = model.contrastive_loss if stage == "adapt" else model.caption_loss
        self.loss = torch.compile(loss, mode=mode, dynamic=False) if compiled else loss
        if compiled:
            model.compiled_next_words = torch.compile(model.next_words, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def prepare(self, batch: PairBatch) -> "PaddedBatch":
        """Its collate function pads to a static length."""
        if isinstance(batch, PaddedBatch):
            return batch
        words = min(MAX_WORDS, len(self.model.text_encoder.position))

        def padded(ids: Tensor | None) -> Tensor | None:
            return None if ids is None else F.pad(ids, (0, max(0, words - ids.shape[-1])), value=PAD_ID).to(self.device)

        text = None if batch.text is None else batch.text.padded()
        ids = {"text_ids": padded(text), "input_ids": padded(batch.input_ids), "target_ids": padded(batch.target_ids)}
        return PaddedBatch(batch.images.to(self.device), batch.ids, **ids)

    def forward_backward(self, batch: PairBatch) -> Tensor:
        self.model.train()
        batch = self.prepare(batch)
        with self.autocast():
            if self.stage == "adapt":
                loss = self.loss(batch.images, batch.text_ids)
            elif batch.input_ids.shape[2] == 1:
                loss = self.loss(batch.images, batch.input_ids[:, :, 0], batch.target_ids[:, :, 0])
            else:
                raise ValueError(f"peer B learns from one caption a pair and step, the batch has {batch.input_ids.shape[2]}.")
        loss.backward()
        return loss.detach()

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))

    def step(self, batch: PairBatch) -> Tensor:
        loss = self.forward_backward(batch)
        self.optimizer_step()
        return loss

    def generate(self, batch: PairBatch, max_length: int = MAX_WORDS) -> Tensor:
        self.model.eval()
        with self.autocast():
            ids = self.model.generate(batch.images.to(self.device), max_length)
        return ids.unflatten(0, (len(batch.images), -1))


def build(
    config: ModelConfig,
    state: Mapping[str, Tensor] | None,
    stage: Stage,
    device: torch.device | str,
    compiled: bool = False,
    *,
    precision: str = "bf16",
    total_steps: int = 100_000,
    mode: str = "default",
) -> IdiomaticStepper:
    """``precision`` is "bf16" or "fp32"; ``mode`` is torch.compile's, for the loss and its backward, the optimiser being fused anyway."""
    if precision not in ("bf16", "fp32"):
        raise ValueError(f'precision must be "bf16" or "fp32", got {precision!r}.')
    if config.pair_input != "concat":
        raise ValueError('peer B knows pair_input "concat" only.')
    device = torch.device(device)
    with device:
        model = Model(config, stage)
    if state is not None:
        weights, own = checkpoint.from_official(state), model.state_dict().keys()
        model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own})
    return IdiomaticStepper(model, stage, device, precision, total_steps, compiled, mode)
