"""The fast step against the plain one: everything that fastidc does to be quick, on and off, from shared states along a run."""

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import test_graphs
import torch
from torch import Tensor

from fastidc.data.images import ImageStore
from fastidc.data.loaders import PairBatch, PairLoader
from fastidc.data.records import all_captions, load_records
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import Tokenizer, vocabulary_of
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision
from fastidc.train.shadows import Shadows

OPS = ("attention", "layer_norm", "quick_gelu", "info_nce", "linear_cross_entropy", "bert_adam")
BETWEEN = 3  # steps from one shared state to the next
LIMIT = 5e-6
CONFIG = test_graphs.CONFIG.replace(vision_layers=2, intra_layers=1, captioner_layers=1)


@dataclass(frozen=True)
class Plain:
    """A stage's loss as it is written down: every pair by itself, every token, captions padded."""

    name: str = "plain"
    weight: float = 1.0
    reads_tokens: bool = True

    def loss(self, model: CLIP4IDC, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        before, *others = batch.images.permute(0, 1, 4, 2, 3).unbind(1)
        if batch.text is not None:
            return model.adaptation_loss(before, others[0], batch.text.padded())
        captions = zip(others, batch.input_ids.unbind(1), batch.target_ids.unbind(1), strict=True)
        return sum(model.caption_loss(before, after, inputs[:, 0], targets[:, 0]) for after, inputs, targets in captions)


def build(stage: str, config, recipe, steps: int, *, fast: bool, precision: str = "fp32") -> Trainer:
    model = CLIP4IDC(config.replace(captioner_layers=0) if stage == "adapt" else config).train()
    optimizer = Optimizer(model, stage, recipe, steps)
    if precision == "bf16":
        model.shadows = Shadows(model, stage, torch.bfloat16)
    task = objectives(stage, recipe, ALONE) if fast else (Plain(),)
    return Trainer(model, task, optimizer, ALONE, torch.device("cpu"), Precision(precision, "cpu"), graphs=fast)


def step(trainer: Trainer, batch: PairBatch) -> float:
    ready = ((batch,),) if isinstance(trainer.objectives[0], Plain) else trainer.ready([batch])
    return float(trainer.run(ready)[0])


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_one_step_from_ten_shared_states(stage, backend, monkeypatch):
    """Kernels (interpreted where there is no GPU) or torch's operators, buckets, buffers, packing and every removal against every op's reference
    on the plain loss, in fp32: the loss, and every parameter after the update."""
    pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")
    torch.manual_seed(0)
    fast, slow = (build(stage, CONFIG, test_graphs.recipe(stage), 40, fast=on) for on in (True, False))
    moved = 0
    for state in range(10):
        given = test_graphs.batch(stage, state, (5, 8))
        fast.model.load_state_dict(slow.model.state_dict())
        fast.optimizer.load_state_dict(copy.deepcopy(slow.optimizer.state_dict()), "the other")
        before = [p.detach().clone() for p in slow.model.parameters()]
        monkeypatch.setenv("FASTIDC_BACKEND", ",".join(f"{op}={backend}" for op in OPS))
        loss = step(fast, given)
        monkeypatch.setenv("FASTIDC_BACKEND", ",".join(f"{op}=reference" for op in OPS))
        assert loss == pytest.approx(step(slow, given), rel=LIMIT), state
        for (name, p), other, was in zip(fast.model.named_parameters(), slow.model.parameters(), before, strict=True):
            assert (p - other).norm() <= LIMIT * other.norm() + 1e-12, f"{name} after state {state}"
            moved += not torch.equal(other, was)
        monkeypatch.setenv("FASTIDC_BACKEND", "")
        for between in range(BETWEEN):
            step(slow, test_graphs.batch(stage, 1000 * (state + 1) + between))
    assert moved > 9 * 30, "all but the first step's rate, which is 0"
    assert fast.graphs.captured


def curve(stage: str, data: Path, seed: int, *, fast: bool) -> list[float]:
    """Losses of 300 steps, in means over 30."""
    recipe = replace(test_graphs.recipe(stage), batch_size=8, seed=seed, max_words=20)
    records = load_records(data, "clevr")["train"]
    words = vocabulary_of(all_captions(records))
    config = CONFIG.replace(vocabulary=words, vocab_size=len(words))
    torch.manual_seed(seed)
    trainer = build(stage, config, recipe, 300, fast=fast, precision="bf16" if fast else "fp32")
    loader, losses = PairLoader(stage, records, Tokenizer.of(config), ImageStore(config.image_size), recipe, workers=1), []
    for epoch in itertools.count():
        for batch in loader.epoch(epoch):
            losses.append(step(trainer, batch))
            if len(losses) == 300:
                return [sum(losses[i : i + 30]) / 30 for i in range(0, 300, 30)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_300_steps(stage, clevr):
    """bf16 with shadows, buckets, buffers and packing learns as fp32 without them does: at all times within what three seeds differ by."""
    plain = [curve(stage, clevr, seed, fast=False) for seed in (1, 2, 3)]
    fast = curve(stage, clevr, 1, fast=True)
    assert all(one[-1] < 0.9 * one[0] for one in plain), "nothing was learnt, and nothing is compared"
    for got, *seeds in zip(fast, *plain, strict=True):
        spread = max(seeds) - min(seeds)
        assert min(seeds) - 0.25 * spread <= got <= max(seeds) + 0.25 * spread, (fast, plain)
