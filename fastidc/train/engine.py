"""One training step and the loop around it."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastidc.config import Recipe
from fastidc.data.loaders import PairBatch, PairLoader
from fastidc.data.random import generator
from fastidc.errors import FastidcError
from fastidc.train import shards
from fastidc.train.chunks import backward_in_chunks
from fastidc.train.compiled import refusals_as_sentences
from fastidc.train.distributed import World
from fastidc.train.graphs import WARM_UP, WARM_UP_SHARED, StepGraphs, tensors_of
from fastidc.train.objectives import Objective
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision
from fastidc.train.ready import Ready, make_ready


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
    ids: list[str]  # of the samples that this process has read for it


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


@dataclass(frozen=True)
class Place:
    """Where in the data a run stands: ``passed`` batches of ``epoch`` are behind. With any behind, its `fit` owes the epoch its ``on_epoch``."""

    epoch: int = 0
    passed: int = 0


def fit(
    trainer: Trainer,
    loader: PairLoader,
    recipe: Recipe,
    *,
    total_steps: int,
    begin: Place = Place(),
    ready: Callable[[], None] = lambda: None,
    on_step: Callable[[Step], None],
    on_epoch: Callable[[int], bool],
    until: Callable[[], bool] = lambda: False,
    now: Callable[[str], None] = lambda phase: None,
) -> None:
    """Trains until the optimiser has made ``total_steps``; ``on_epoch(epoch)`` follows every epoch that trained, also the last one if it
    was cut short, and ends training by returning True. Batches of an epoch that do not fill a step are left out, as officially.

    begin: where a run goes on, and ``ready`` is called when the generators of that epoch's dropout are set, to put them where they were. until:
    asked after every step, ends training there and then. now: hears what is going on.
    """
    optimizer, epoch, passed = trainer.optimizer, begin.epoch, begin.passed
    while optimizer.steps < total_steps or passed:
        trainer.model.train()
        # Dropout is a function of the seed, the epoch and the process, so a run that resumes at an epoch draws what it would have drawn.
        torch.manual_seed(int(generator(recipe.seed, "dropout", epoch, trainer.world.rank).integers(2**63)))
        if passed:
            ready()
        batches: list[PairBatch] = []
        now("reading")
        with closing(loader.epoch(epoch, passed) if optimizer.steps < total_steps else _nothing()) as stream:
            for batch in stream:
                batches.append(batch)
                passed += 1
                if len(batches) < recipe.accumulate:
                    continue
                now("training")
                lrs = optimizer.lrs
                loss, norm = trainer.step(batches)
                pairs = sum(b.images.shape[0] * (b.images.shape[1] - 1) for b in batches) * trainer.world.size
                ids = [name for b in batches for name in b.ids]
                batches = []
                on_step(Step(optimizer.steps, epoch, passed, lrs, loss, norm, pairs, ids))
                if until():
                    return
                if optimizer.steps == total_steps:
                    break
                now("reading")
        if on_epoch(epoch):
            return
        epoch, passed = epoch + 1, 0


def _nothing() -> Iterator[PairBatch]:
    yield from ()
