"""One training step and the loop around it."""

import ctypes
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastidc import ops
from fastidc.config import Recipe
from fastidc.data.loaders import PairBatch, PairLoader
from fastidc.data.random import generator
from fastidc.errors import FastidcError
from fastidc.train import shards
from fastidc.train.chunks import backward_in_chunks
from fastidc.train.compiled import refusals_as_sentences
from fastidc.train.distributed import ALONE, World
from fastidc.train.graphs import WARM_UP, WARM_UP_SHARED, StepGraphs, tensors_of
from fastidc.train.objectives import Objective
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision
from fastidc.train.ready import Ready, make_ready
from fastidc.train.scalars import Scalars


def keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next step: giving it back and faulting it in again costs a CPU step about 10%.

    Elsewhere (another C library) it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


@dataclass(frozen=True)
class Step:
    """What is known after an optimiser's step; tensors are still on the device."""

    number: int  # from 1
    epoch: int  # from 0
    passed: int  # batches of this epoch that are behind, from 1
    lrs: list[float]
    loss: Tensor  # of this process; the mean over the batches that made up the step
    grad_norm: Tensor  # before clipping
    pairs: int  # of all processes


class Trainer:
    """A model with its objectives and its optimiser, in one process or in each of many, whole or in parts (`fastidc.train.shards`)."""

    def __init__(
        self,
        model,
        objectives: Sequence[Objective],
        optimizer: Optimizer,
        world: World,
        device: torch.device,
        precision: Precision,
        micro_batch: int | None = None,
        graphs: bool = False,
        reduce_dtype: torch.dtype | None = None,
        instead: Callable[[str], None] | None = None,
    ):
        """micro_batch: activations of so many samples at a time, for the one objective of adaptation (`fastidc.train.chunks`). graphs: the step as
        CUDA graphs (`fastidc.train.graphs`), gradients of several processes averaged inside, which takes NCCL. reduce_dtype: torch.bfloat16 has
        DistributedDataParallel's buckets travel in it, half the bytes, and each rounded before it is averaged; None: as they are. instead: where a step
        cannot be captured it is told so and training goes on without; or that is a FastidcError."""
        self.model, self.objectives, self.optimizer, self.micro_batch = model, objectives, optimizer, micro_batch
        self.world, self.device, self.precision = world, device, precision
        # Frozen parameters are marked by the optimiser, so every other one has a gradient in every step.
        self.wrapped, stream = model, None
        self._copies: torch.cuda.Stream | None = None
        self.sharded, self.compiled = shards.is_sharded(model), model.caption_bucket is not None
        if world.size > 1 and not self.sharded:
            # The buffers are constants; unasked, every forward would broadcast them.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name for name, _ in model.named_buffers()])
            # Where gradients are accumulated is decided when it is made, and nothing captured may touch the stream that everything else is on.
            stream = torch.cuda.Stream(device) if graphs and device.type == "cuda" else None
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            if reduce_dtype is not None:
                self.wrapped.register_comm_hook(None, _compress(reduce_dtype))
        self.graphs, self.instead = None, instead
        if graphs:
            warm_up = WARM_UP if self.wrapped is model else WARM_UP_SHARED
            say = None if instead is None else self._without_graphs
            self.graphs = StepGraphs(self._whole, device, warm_up, say, stream, self._addresses)

    def step(self, batches: Sequence[PairBatch]) -> tuple[Tensor, Tensor]:
        """Forward and backward of every batch, then one update by the mean of their losses. Returns that mean and the gradient norm before
        clipping, still on the device."""
        return self.run(self.ready(batches))

    def ready(self, batches: Sequence[PairBatch]) -> Ready:
        """What `run` takes: ``batches`` of one step, on the host, made into tensors on the device."""
        positions = self.model.config.context_length if self.graphs is not None or self.compiled else None
        if self.device.type != "cuda":
            return make_ready(batches, self.device, self.micro_batch, positions)
        current = torch.cuda.current_stream(self.device)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._copies):  # beside the step before, not behind it; what lies on the device already is left where it is
            ready = make_ready(batches, self.device, self.micro_batch, positions)
        current.wait_stream(self._copies)
        for x in tensors_of(ready):
            x.record_stream(current)
        return ready

    def run(self, ready: Ready) -> tuple[Tensor, Tensor]:
        """See `step`. Nothing in it waits for the device."""
        self.optimizer.set_rates()
        if self.model.shadows is not None:
            self.model.shadows.refresh()  # a replay would not notice that anybody has written weights
        if self.graphs is not None:
            self.model.pair_encoder.patch_embed.refold()
        loss, norm = self._whole(ready) if self.graphs is None else self.graphs(ready)
        self.optimizer.steps += 1
        return loss, norm

    def _whole(self, ready: Ready) -> tuple[Tensor, Tensor]:
        return self.passes(ready), self.optimizer.update()

    def _addresses(self) -> tuple[int, int]:
        """Changes when moments or shadows are other tensors than they were."""
        return self.optimizer.loaded, 0 if self.model.shadows is None else self.model.shadows.adopted

    def _without_graphs(self, sentence: str) -> None:
        for p in self.optimizer.parameters:  # what was captured of them was never computed
            p.grad = None
        self.instead(f"{sentence} It goes on without.")

    def passes(self, ready: Ready) -> Tensor:
        """Forward and backward alone: the gradients are there, averaged over processes; returns the mean of the losses."""
        total = None
        for i, chunks in enumerate(ready):
            share, waits = 1 / len(ready), i + 1 < len(ready)
            if len(chunks) > 1:
                loss = backward_in_chunks(self, chunks, self.objectives[0], share, waits)
            else:
                loss = self._backward(chunks[0], share, waits)
            total = loss if total is None else total + loss
        if self.sharded:
            shards.average_the_rest(self.model, self.world)
        return total

    def _backward(self, batch: PairBatch, share: float, waits: bool) -> Tensor:
        with self.gradients_stay(waits), refusals_as_sentences() if self.compiled else nullcontext():
            with self.precision.autocast():
                losses = self.wrapped(batch, self.objectives)
                loss = torch.stack([o.weight * losses[o.name] for o in self.objectives]).sum() * share
            self.optimizer.scaler.scale(loss).backward()
        return loss.detach()

    def gradients_stay(self, waits: bool):
        """The context of a backward pass whose gradients are not averaged over processes yet, where ``waits``."""
        if not waits or self.world.size == 1:
            return nullcontext()
        return shards.gradients_stay(self.model) if self.sharded else self.wrapped.no_sync()


def _compress(dtype: torch.dtype) -> Callable:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    if dtype != torch.bfloat16:
        raise FastidcError(f"gradients are averaged over processes in bf16 or as they are, not in {dtype}.")
    return default_hooks.bf16_compress_hook


MOST_SKIPPED = 40  # in a row: the scaler has gone from 2^16 to 2^-24, and it was not the scale


class StepLog:
    """One JSON line a step. Losses stay on the device until `flush`, so that logging makes no step wait.

    With several processes the losses are their mean and the first process writes; all call `add` and `flush` alike. The line of a step whose
    update was left out, because its gradient is not finite, has ``skipped``: how many there were up to it.
    """

    def __init__(self, path: Path, world: World = ALONE, *, flush_every: int = 50, keep: int = 0, scalars: Scalars | None = None):
        self._file: TextIO | None = None
        world.on_main(lambda: self._open(path, keep))
        self._skipped = 0  # steps in a row
        self._left_out = 0  # updates, in this process's time
        self._waiting: list[tuple[dict, Tensor, Tensor]] = []
        self._world, self._flush_every, self._scalars = world, flush_every, scalars
        self.loss = math.nan

    def _open(self, path: Path, keep: int) -> None:
        """``keep``: steps of an earlier run that stay, where this one goes on after them."""
        old = path.read_text(encoding="utf-8").splitlines() if keep and path.is_file() else []
        self._file = path.open("w", encoding="utf-8")
        for line in old:
            with suppress(ValueError, TypeError, KeyError):  # a line that a kill cut short
                if json.loads(line)["step"] <= keep:
                    self._file.write(line + "\n")

    def add(self, facts: dict, loss: Tensor, grad_norm: Tensor) -> None:
        self._waiting.append((facts, loss, grad_norm))
        if len(self._waiting) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Writes what waits; FastidcError at the first loss that is not finite, and where an op met what it could not read."""
        bad = self._write(together=True)
        said = self._faults()
        if bad is not None:
            said.insert(
                0,
                f"the loss or its gradient is not finite at step {bad}; check the weights that it started from, or lower the learning rate.",
            )
        if said:
            raise FastidcError(" ".join(said))

    def _faults(self) -> list[str]:
        """What any process's kernels found wrong, each sentence once, on all of them, so that none goes on alone."""
        found: dict[str, int] = {}
        for rank, sentences in enumerate(self._world.gather_everywhere(ops.take_faults())):
            for sentence in sentences:
                found.setdefault(sentence, rank)
        return [sentence if self._world.size == 1 else f"Process {rank}: {sentence}" for sentence, rank in found.items()]

    def _write(self, together: bool) -> int | None:
        """Writes what waits; returns the first step that is not finite."""
        if not self._waiting:
            return None
        losses = torch.stack([loss.float() for _, loss, _ in self._waiting])
        norms = torch.stack([norm.float() for _, _, norm in self._waiting])
        losses = self._world.mean(losses) if together else losses
        bad = None
        for (facts, _, _), loss, norm in zip(self._waiting, losses.tolist(), norms.tolist(), strict=True):
            # the scaler's way: it left the step out, and halves its factor; but not for ever
            skipped = math.isfinite(loss) and not math.isfinite(norm) and facts.get("scaled", False)
            self._skipped = self._skipped + 1 if skipped else 0
            finite = math.isfinite(loss) and (math.isfinite(norm) or 0 < self._skipped < MOST_SKIPPED)
            bad = bad or (None if finite else facts["step"])
            row = {**facts, "loss": loss if math.isfinite(loss) else None, "grad_norm": norm if math.isfinite(norm) else None}
            if not math.isfinite(norm):
                self._left_out += 1
                row["skipped"] = self._left_out
            if self._file is not None:
                self._file.write(json.dumps(row) + "\n")
            if self._scalars is not None and finite:
                self._scalars.add({"loss": loss, "grad_norm": norm, "lr": max(facts["lr"])}, facts["step"], "train")
            self.loss = loss
        if self._file is not None:
            self._file.flush()
        self._waiting.clear()
        return bad

    def close(self) -> None:
        """Also after an interrupt: every step that ran is in the file."""
        self._write(together=False)
        if self._file is not None:
            self._file.close()


def fit(
    trainer: Trainer,
    loader: PairLoader,
    recipe: Recipe,
    *,
    total_steps: int,
    first_epoch: int = 0,
    on_step: Callable[[Step], None],
    on_epoch: Callable[[int], bool],
) -> None:
    """Trains until the optimiser has made ``total_steps``; ``on_epoch(epoch)`` follows every epoch that trained, also the last one if it
    was cut short, and ends training by returning True. Batches of an epoch that do not fill a step are left out, as officially."""
    optimizer, epoch = trainer.optimizer, first_epoch
    while optimizer.steps < total_steps:
        trainer.model.train()
        # Dropout is a function of the seed, the epoch and the process, so a run that resumes at an epoch draws what it would have drawn.
        torch.manual_seed(int(generator(recipe.seed, "dropout", epoch, trainer.world.rank).integers(2**63)))
        batches: list[PairBatch] = []
        for passed, batch in enumerate(loader.epoch(epoch), start=1):
            batches.append(batch)
            if len(batches) < recipe.accumulate:
                continue
            lrs = optimizer.lrs
            loss, norm = trainer.step(batches)
            pairs = sum(b.images.shape[0] * (b.images.shape[1] - 1) for b in batches) * trainer.world.size
            batches = []
            on_step(Step(optimizer.steps, epoch, passed, lrs, loss, norm, pairs))
            if optimizer.steps == total_steps:
                break
        if on_epoch(epoch):
            return
        epoch += 1
