"""The weights that are multiplied in half precision, kept in half precision beside their fp32 masters: autocast finds nothing to cast.

Under autocast a step casts every weight of a product to half precision and every gradient back. Here a shadow, which the optimiser writes in the
sweep that writes its master, stands in for each such weight while `CLIP4IDC.forward` runs; its gradient goes to the master. What is computed is
the same to the last bit. No more memory is needed where a step needs most: autocast's copies live until the backward pass, too.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastidc.config import Recipe
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import MLP, state_of
from fastidc.train.distributed import World
from fastidc.train.optim import Stage, takes_part
from fastidc.train.precision import Precision

_WORDS = "text_encoder.token_embedding"


def multiplied(model: CLIP4IDC, stage: Stage) -> list[str]:
    """Names of the parameters that autocast casts in a stage's forward pass; tests/train/test_shadows.py watches it do so.

    Weights and biases of linear layers, the pairs' projection and, in captioning, the word table. Not the bias of the towers'
    first MLP layer, which a GPU adds in fp32, nor the text tower's projection, whose dtype tells the tower in which one its tables are added.
    """
    names = {"pair_encoder.projection", *([_WORDS] if stage == "finetune" else [])}
    apart = {id(module.fc1.bias) for module in model.modules() if isinstance(module, MLP)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            names.update(f"{path}.{name}" for name, p in module.named_parameters() if id(p) not in apart)
    return [name for name, _ in model.named_parameters() if name in names and takes_part(name, stage)]


class _StandIns(torch.autograd.Function):
    """Shadows as functions of their masters: to a backward pass what a cast is, without the cast. One call has several, since it is calls that
    cost the host time; but no more than a block's, since none of their gradients arrives before the last, and DDP sends them off as they come."""

    @staticmethod
    def forward(ctx, shadows: list[Tensor], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(shadow.detach() for shadow in shadows)  # the shadow itself would become part of the graph

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        return None, *gradients  # autograd casts each to its master's `grad_dtype`


class Shadows:
    """Shadows of ``model``'s `multiplied` parameters, which must be fp32, in ``dtype``; ``model.shadows`` is where the model and
    `fastidc.train.optim.Optimizer` look for them.

    half_gradients: masters get gradients in ``dtype``, the one that they are made in, as long as there is one to a step. A backward pass that finds
    gradients of an earlier one adds to them in fp32. Not for several processes, whose DDP averages in fp32, nor for optimisers other than BertAdam.

    A shadow is up to date where its master is the tensor that it was, at the same address and in the same version: each forward pass asks, which
    costs the host 0.1 ms and the device nothing. Versions count what torch's operators write in place. Neither our kernels
    nor torch's fused optimisers do, so `fastidc.ops.BertAdamStep` and `fastidc.train.optim.Optimizer` count for them. Unseen are a fused optimiser
    other than theirs and a write through ``parameter.data``; nothing here does either. A CUDA graph that is replayed asks nothing: the optimiser
    in it writes its shadows, and weights loaded between replays need a `refresh` before the next.
    """

    def __init__(self, model: CLIP4IDC, stage: Stage, dtype: torch.dtype, *, half_gradients: bool = False):
        self.dtype, self.half_gradients = dtype, half_gradients
        self._names = multiplied(model, stage)
        paths = [name.rpartition(".") for name in self._names]
        self._places = [(model.get_submodule(path)._parameters, leaf) for path, _, leaf in paths]
        self._masters: list[Tensor] = [parameters[leaf] for parameters, leaf in self._places]
        for name, p in zip(self._names, self._masters, strict=True):
            if p.dtype != torch.float32:
                raise FastidcError(f"shadows are kept of fp32 parameters, and {name} is {p.dtype}.")
            if p.grad is None and p.grad_dtype != p.dtype:  # shadows of an earlier run
                p.grad_dtype = p.dtype
        self._shadows = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._masters]
        self._seen: list[tuple | None] = [None] * len(self._masters)
        self.adopted = 0  # how often a master was another tensor than before
        self._index = {id(p): i for i, p in enumerate(self._masters)}
        groups: dict[str, list[int]] = {}
        for i, (name, (path, _, _)) in enumerate(zip(self._names, paths, strict=True)):
            block = re.match(r".*?\.\d+(?=\.)", name)
            # the word table is an embedding as well, and read as its fp32 master there: `stand_in` is for its other uses
            if name != _WORDS:
                groups.setdefault(block[0] if block else path, []).append(i)
        self._groups, self._running = list(groups.values()), False
        self.refresh()

    def __len__(self) -> int:
        return len(self._shadows)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a model is not what a run trains: it has none."""

    @property
    def names(self) -> list[str]:
        return list(self._names)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings up to date what anybody but the optimiser has written. Asks the host alone, and costs nothing where there is nothing to do."""
        stale = []
        for i, (parameters, leaf) in enumerate(self._places):
            p = parameters[leaf]
            if p is not self._masters[i] or state_of(p) != self._seen[i]:
                stale.append(i)
                self._adopt(i, p)
        if stale:
            torch._foreach_copy_([self._shadows[i] for i in stale], [self._masters[i].detach() for i in stale])

    def _adopt(self, i: int, p: Tensor) -> None:
        self.adopted += p is not self._masters[i]
        del self._index[id(self._masters[i])]
        self._masters[i], self._index[id(p)], self._seen[i] = p, i, state_of(p)
        if self._shadows[i].shape != p.shape or self._shadows[i].device != p.device:
            self._shadows[i] = torch.empty_like(p, dtype=self.dtype, requires_grad=False)

    def of(self, p: Tensor) -> Tensor | None:
        """The shadow of a parameter, for whoever writes both."""
        i = self._index.get(id(p))
        return None if i is None else self._shadows[i]

    def written(self, params: Iterable[Tensor]) -> None:
        """Notes that ``params`` and their shadows have just been written together."""
        for p in params:
            if (i := self._index.get(id(p))) is not None:
                self._seen[i] = state_of(p)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While it lasts the modules have shadows in the place of parameters, but for the word table's; where autocast is off, or casts to
        another dtype, nothing changes. The host's work is a dictionary entry each, and an autograd node a block."""
        device = self._masters[0].device.type
        if self._running or not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != self.dtype:
            yield
            return
        self.refresh()
        if torch.is_grad_enabled():
            self._choose_grad_dtype()
        self._running = True
        try:
            for group in self._groups:
                for i, tensor in zip(group, self._stand_ins(group), strict=True):
                    parameters, leaf = self._places[i]
                    parameters[leaf] = tensor
            yield
        finally:
            self._running = False
            for (parameters, leaf), p in zip(self._places, self._masters, strict=True):
                parameters[leaf] = p

    def stand_in(self, p: Tensor) -> Tensor:
        """What stands in for ``p`` in one product, p itself where there is no such thing. Made anew for each use: the gradients of several are
        added up in fp32, as those of several casts are."""
        i = self._index.get(id(p)) if self._running else None
        return p if i is None else self._stand_ins([i])[0]

    def _stand_ins(self, group: list[int]) -> list[Tensor]:
        out = [self._shadows[i] for i in group]
        if torch.is_grad_enabled():
            trains = [k for k, i in enumerate(group) if self._masters[i].requires_grad]
            if trains:
                masters = [self._masters[group[k]] for k in trains]
                for k, tensor in zip(trains, _StandIns.apply([out[k] for k in trains], *masters), strict=True):
                    out[k] = tensor
        return out

    def _choose_grad_dtype(self) -> None:
        """Gradients in half precision where a step's first backward pass is to come, in fp32 where it is a later one."""
        if not self.half_gradients:
            return
        # not the word table: its gradient as an embedding is fp32, and all its gradients are one sum
        for p in (self._masters[i] for group in self._groups for i in group):
            if not p.requires_grad:
                continue
            if p.grad is None:
                if p.grad_dtype != self.dtype:
                    p.grad_dtype = self.dtype
            elif p.grad_dtype != p.dtype:
                gradient, p.grad = p.grad, None
                p.grad_dtype = p.dtype
                p.grad = gradient.to(p.dtype)


def shadows_for(
    model: CLIP4IDC, stage: Stage, recipe: Recipe, precision: Precision, world: World, fsdp: bool = False
) -> tuple[Shadows | None, str]:
    """The shadows that a run keeps, or None, and the reason as a clause. The model must be on its device, in the dtypes in which it trains.

    BertAdam's kernels write them; with the other optimisers they are copied anew before the next forward pass, in one call.
    """
    if precision.name not in ("bf16", "fp16"):
        return None, f"{precision.name} casts no weights"
    if fsdp:
        return None, "--fsdp gathers weights for a block at a time, which is when they are cast"
    why = why_wide(model, recipe, precision, world)
    gradients = f"gradients in {precision.name} too" if why is None else f"gradients in fp32, since {why}"
    return Shadows(model, stage, precision.dtype, half_gradients=why is None), f"no weight is cast in a step; {gradients}"


def why_wide(model: CLIP4IDC, recipe: Recipe, precision: Precision, world: World) -> str | None:
    """Why masters get gradients in fp32, as a clause; None where they do not."""
    if precision.name != "bf16":
        return "a scaled loss is unscaled in fp32"
    if world.size > 1:
        return "processes average them"
    if recipe.accumulate > 1 or recipe.micro_batch is not None:
        return "several backward passes add up to a step"
    if recipe.optimizer != "bert_adam":
        return f"{recipe.optimizer} reads no others"
    if model.logit_scale.device.type != "cuda":
        return "on a CPU so are the optimiser's sums"
    return None
