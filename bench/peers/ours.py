"""fastidc itself, driven as `fastidc.train.engine.Trainer` drives it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.peers.stepper import Stage
from fastidc import checkpoint
from fastidc.config import PRESETS, ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import Block, take_rows
from fastidc.train.compiled import compile_captioner
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.objectives import Captioning, objectives
from fastidc.train.optim import Optimizer
from fastidc.train.policy import Choice, policy
from fastidc.train.precision import Precision
from fastidc.train.ready import Ready
from fastidc.train.shadows import shadows_for


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
        graph: Choice,
        shadows: bool,
        all_words: bool,
        text_tower: bool,
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
        chosen = policy(stage, device.type, precision, recipe, compiling=compiling, graph=graph)
        if chosen.compile.active:
            compile_captioner(model)
        if shadows and chosen.shadows.active:
            model.shadows, _ = shadows_for(model, stage, recipe, self.precision, ALONE)
        self.optimizer = Optimizer(model, stage, recipe, total_steps, self.precision.scaler())
        wanted = objectives(stage, recipe, ALONE)
        if all_tokens:
            wanted = tuple(replace(objective, reads_tokens=True) for objective in wanted)
        if all_words:
            _compute_all_words(model.text_encoder.blocks[-1])
        if text_tower:
            wanted = tuple(WithTextTower(**vars(objective)) for objective in wanted)
        self.trainer = Trainer(model, wanted, self.optimizer, ALONE, device, self.precision, graphs=chosen.graph.active)

    def prepare(self, batch: PairBatch) -> Ready:
        batch = batch if self.shared else independent(batch)
        if self.packed:
            return self.trainer.ready([batch])
        if batch.text is not None:
            batch = replace(batch, text=batch.text.padded())  # the model takes either
        return ((batch.to(self.device),),)

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

    def _ready(self, batch: PairBatch | Ready) -> Ready:
        return self.prepare(batch) if isinstance(batch, PairBatch) else batch

    def forward_backward(self, batch: PairBatch | Ready) -> Tensor:
        self.model.train()
        with self.chosen():
            return self.trainer.passes(self._ready(batch))

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def step(self, batch: PairBatch | Ready) -> Tensor:
        self.model.train()
        with self.chosen():
            return self.trainer.run(self._ready(batch))[0]

    def generate(self, batch: PairBatch | Ready, max_length: int = 32) -> Tensor:
        self.model.eval()
        batch = self._ready(batch)[0][0]
        with self.chosen(), torch.no_grad(), self.precision.autocast():
            tokens = self.model.encode_batch(batch.images)[1]
            ids = self.model.generate_from_tokens(tokens.flatten(0, 1), max_length, stop_early=self.stop_early)[0]
        return ids.unflatten(0, tokens.shape[:2])


@dataclass(frozen=True)
class WithTextTower(Captioning):
    """Captioning that runs the text tower on an empty sentence for each pair and drops the result, as the official code does."""

    def loss(self, model: CLIP4IDC, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        config, pairs = model.config, encoded[1].flatten(0, 1)
        ids = torch.zeros(len(pairs), WORDS, dtype=torch.long, device=pairs.device)
        ids[:, 0], ids[:, 1] = config.start_id, config.end_id
        model.encode_text(ids[:, : config.context_length])
        return super().loss(model, batch, encoded)


WORDS = 32  # tokens of a caption in the official scripts


def _compute_all_words(block: Block) -> None:
    """Has the text tower's last block compute every row, of which the end tokens' are taken."""

    def at(x: Tensor, branch: Tensor | None, rows: Tensor, *sequences) -> tuple[Tensor, Tensor]:
        return tuple(take_rows(part, rows) for part in block(x, branch, *sequences))

    block.at = at


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
    graph: Choice = "auto",
    all_words: bool = False,
    text_tower: bool = False,
    shadows: bool = True,
) -> OurStepper:
    """``precision`` is one of `fastidc.train.precision.PRECISIONS`. What fastidc compiles it decides itself, so ``compiled`` is refused.

    ``stop_early=False`` decodes the official evaluation's fixed number of raw steps. What follows takes something away, for the waterfall:
    ``all_tokens`` computes every token of the last inter layer where two are read, ``shared=False`` encodes the before-image once for each
    of its pairs, ``packed=False`` has captions padded to one length, ``backends`` is what FASTIDC_BACKEND says while this stepper runs,
    ``compiling`` what ``--compile`` says, ``graph`` what ``--graph`` says, ``shadows=False`` has autocast cast every weight in every step,
    ``all_words`` computes every row of the last text layer, ``text_tower`` runs the text tower in captioning and drops its result.
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
    removals = {"all_tokens": all_tokens, "shared": shared, "packed": packed, "all_words": all_words, "text_tower": text_tower}
    how = {"backends": backends, "compiling": compiling, "graph": graph, "shadows": shadows}
    return OurStepper(model, stage, device, precision, total_steps, stop_early, **removals, **how)
