"""The training step as CUDA graphs: one launch in the place of thousands, for each shape that comes up.

A graph replays kernels at the addresses of its capture, so everything that changes from step to step lies in memory that stays: the batch in
buffers, the rates on the device (`fastidc.train.optim.Optimizer.set_rates`), dropout's generator in torch's hands. Shapes are few because
batches are filled up to a bucket (`fastidc.train.ready`).
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastidc.errors import FastidcError
from fastidc.train.ready import Ready

KEPT = 16  # graphs; the least recently used one goes
WARM_UP = 2  # steps of a shape before it is captured: kernels compile, libraries allocate, the optimiser makes its state
WARM_UP_SHARED = 11  # with DistributedDataParallel, which lays its buckets out anew meanwhile (PyTorch's notes on CUDA graphs)


class StepGraphs:
    """``run``, which makes a training step of a `Ready` on ``device`` and never asks the device anything, and what it becomes once it is captured.

    Every call is one step, whether eager or replayed: a shape's first ``warm_up`` steps are eager ones, and capturing executes nothing. On
    a CPU a "graph" is ``run`` on the buffers, so that all but the capture is the same.

    A step that cannot be captured is a FastidcError; or, with ``instead``, a sentence for it to say, after which all steps are eager.
    """

    def __init__(
        self,
        run: Callable[[Ready], tuple[Tensor, ...]],
        device: torch.device,
        warm_up: int = WARM_UP,
        instead: Callable[[str], None] | None = None,
        stream: "torch.cuda.Stream | None" = None,
        held: Callable[[], Hashable] = lambda: None,
    ):
        """stream: the one that eager steps and captures are on, where it matters (DistributedDataParallel); by default the current one, and for
        captures another. held: what changes when anything that ``run`` holds moves to another address; graphs are then dropped."""
        self.run, self.device, self.warm_up, self.instead, self.stream, self.held = run, device, warm_up, instead, stream, held
        self.captured, self._wanted, self._at = 0, True, held()
        self._buffers: dict[Hashable, Tensor] = {}  # of all graphs: a replay fills its own before it reads them
        self._graphs: OrderedDict[Hashable, Callable[[Ready], tuple[Tensor, ...]]] = OrderedDict()
        self._seen: Counter = Counter()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, ready: Ready) -> tuple[Tensor, ...]:
        """The results of ``run``, not overwritten by later steps."""
        key = shape_of(ready)
        if self._at != self.held():
            self._graphs.clear()
            self._at = self.held()
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key](ready)
        found = self._eager(ready)
        self._seen[key] += 1
        if self._wanted and self._seen[key] >= self.warm_up:  # right after an eager step, which has made what the capture must not make
            try:
                self._keep(key, self._capture(ready))
            except FastidcError as refusal:
                self._go_on_without(refusal)
        return found

    def _eager(self, ready: Ready) -> tuple[Tensor, ...]:
        try:
            if self.stream is None:
                return self.run(ready)
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                found = self.run(ready)
            current.wait_stream(self.stream)
            return tuple(x.clone() for x in found)
        except torch.OutOfMemoryError as error:
            if not self._graphs:
                raise
            reason = "A step ran out of memory beside those that CUDA graphs keep; train with --graph off."
            try:
                self._go_on_without(FastidcError(reason))
            except FastidcError as refusal:
                raise refusal from error
        self._graphs.clear()
        torch.cuda.empty_cache()
        return self.run(ready)

    def _go_on_without(self, refusal: FastidcError) -> None:
        if self.instead is None:
            raise refusal
        self._wanted = False
        self.instead(str(refusal))

    def _keep(self, key: Hashable, graph: Callable[[Ready], tuple[Tensor, ...]]) -> None:
        self._graphs[key] = graph
        self.captured += 1
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)

    def _capture(self, ready: Ready) -> Callable[[Ready], tuple[Tensor, ...]]:
        number = itertools.count()
        buffers = mapped(lambda x: self._buffers.setdefault((next(number), x.shape, x.dtype), x.clone()), ready)
        held = list(tensors_of(buffers))
        torch._foreach_copy_(held, list(tensors_of(ready)))

        def fill(given: Ready) -> None:
            torch._foreach_copy_(held, list(tensors_of(given)), non_blocking=True)

        if self.device.type != "cuda":

            def rerun(given: Ready) -> tuple[Tensor, ...]:
                fill(given)
                return self.run(buffers)

            return rerun
        graph = torch.cuda.CUDAGraph()
        # casts that autocast remembers from outside would be read at an address that is soon another's
        torch.clear_autocast_cache()
        try:
            # other threads may allocate meanwhile, as the reader of the next batch does
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                results = self.run(buffers)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not _usable(self.device):
                self.instead = None  # what draws dropout's masks is still in the capture that failed: an eager step would fail, too
            raise FastidcError(f"The training step cannot be captured as a CUDA graph ({first}); train with --graph off.") from error
        finally:
            torch.clear_autocast_cache()

        def replay(given: Ready) -> tuple[Tensor, ...]:
            fill(given)
            graph.replay()
            return tuple(x.clone() for x in results)

        return replay


def _usable(device: torch.device) -> bool:
    """Whether the device's generator still draws, which after a failed capture it does not in every version of torch."""
    try:
        torch.rand(1, device=device)
    except RuntimeError:
        return False
    return True


def _parts(value: Any) -> Iterator[Any]:
    """What a `Ready` and the dataclasses in it hold, but for the samples' names."""
    if is_dataclass(value):
        yield from (getattr(value, field.name) for field in fields(value) if field.name != "ids" or isinstance(value.ids, Tensor))
    elif isinstance(value, tuple):
        yield from value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in ``value``, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value):
        yield from tensors_of(part)


def shape_of(value: Any) -> Hashable:
    """Everything of ``value`` but the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if is_dataclass(value) or isinstance(value, tuple):
        return type(value).__name__, *map(shape_of, _parts(value))
    return value


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with function(x) in the place of every tensor x."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(mapped(function, part) for part in value)
    if is_dataclass(value):
        return replace(value, **{field.name: mapped(function, getattr(value, field.name)) for field in fields(value)})
    return value
