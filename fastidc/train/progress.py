"""Everything that decides a run's next step: taken from a session, and put back into one, also where other processes share the work.

Weights and moments are kept whole and by name, whatever process holds which part of them, so one process may go on with what two have saved. The
first process writes them all: every other one would repeat its bytes, and where parameters are shared out (`fastidc.train.shards`) each is put
together for as long as it takes to copy it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastidc.data.random import generator
from fastidc.errors import FastidcError
from fastidc.train import shards
from fastidc.train.distributed import World
from fastidc.train.engine import Place
from fastidc.train.session import Session
from fastidc.train.snapshot import staged


@dataclass
class Progress:
    """What a run knows of itself besides tensors; JSON's types alone."""

    place: Place = field(default_factory=Place)
    done: bool = False  # trained to the end: what is missing are the final scores
    best: dict | None = None  # the kept epoch with its scores
    stale: int = 0  # epochs in a row that were not the best so far
    seconds: float = 0.0  # of training and scoring so far
    counts: tuple[int, int] = (0, 0)  # see `StepLog.counts`
    rollbacks: list[dict] = field(default_factory=list)  # {"at": step, "to": step, "slowed": factor of all rates since}

    def state(self, session: Session, identity: dict[str, Any]) -> dict[str, Any]:
        """What a snapshot's state.json says."""
        optimizer = session.optimizer
        return {
            "step": optimizer.steps,
            "epoch": self.place.epoch,
            "passed": self.place.passed,
            "done": self.done,
            "best": self.best,
            "stale": self.stale,
            "seconds": self.seconds,
            "counts": list(self.counts),
            "rollbacks": self.rollbacks,
            "slowed": optimizer.slowed,
            "scaler": optimizer.scaler.state_dict(),
            "processes": session.world.size,
            "identity": identity,
        }

    @classmethod
    def of(cls, state: dict[str, Any], source: str) -> "Progress":
        """FastidcError naming ``source`` and the field where ``state`` is not what `state` gives."""
        for name, is_good in _FIELDS.items():
            if name not in state or not is_good(state[name]):
                what = repr(state[name])[:60] if name in state else "missing"
                raise FastidcError(f"{source}: not the state of a fastidc run, field {name} is {what}; resume from another one.")
        rest = {name: state[name] for name in ("done", "best", "stale", "seconds", "rollbacks")}
        return cls(Place(state["epoch"], state["passed"]), counts=tuple(state["counts"]), **rest)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "epoch", "passed", "stale"), _is_count),
    "done": lambda x: isinstance(x, bool),
    "best": lambda x: x is None or (isinstance(x, dict) and _is_count(x.get("epoch")) and isinstance(x.get("score"), (int, float))),
    "seconds": lambda x: _is_number(x) and x < 1e12,
    "counts": lambda x: isinstance(x, list) and len(x) == 2 and all(map(_is_count, x)),
    "rollbacks": lambda x: isinstance(x, list) and all(isinstance(one, dict) for one in x),
    "slowed": lambda x: _is_number(x) and 0 < x <= 1,
    "scaler": lambda x: isinstance(x, dict),
    "processes": lambda x: _is_count(x) and x > 0,
}


def captured(session: Session) -> dict[str, dict[str, Tensor]]:
    """Copies of weights, moments and every process's generators, on the CPU of the first process; on the others nothing. All processes call."""
    world = session.world
    random = {"cpu": torch.get_rng_state()}
    if session.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(session.device)
    everyones = world.gather_everywhere(random)
    return {
        "weights": _together(session.model.named_parameters(), world),
        "optimizer": _together(session.optimizer.moments(), world),
        "random": {f"{name}.{rank}": state for rank, states in enumerate(everyones) for name, state in states.items()}
        if world.is_main
        else {},
    }


def _together(named: Iterator[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    wholes: dict[str, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name, x in named:
        if shards.is_part(x):  # one at a time: all of them together are what sharing out avoids
            whole = x.detach().full_tensor()
            out |= staged({name: whole}) if world.is_main else {}
        elif world.is_main:
            wholes[name] = x
    return out | staged(wholes)


def put_back(session: Session, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], source: str) -> None:
    """Undoes `captured`, but for the generators: see `put_back_random`. ``tensors``: on the first process; all processes call. FastidcError naming
    ``source`` where they are not this model's."""
    world, device, optimizer = session.world, session.device, session.optimizer
    own = dict(session.model.named_parameters())
    world.on_main(lambda: _check(own, tensors, state, source))
    with torch.no_grad():
        for name, x in world.broadcast_tensors(tensors.get("weights"), device):
            own[name].copy_(shards.like(x, own[name]))
    moments = {}
    for path, x in world.broadcast_tensors(tensors.get("optimizer"), device):
        p = own.get(path.rpartition("/")[0], x)
        # a copy: what safetensors reads may be the file itself, which does not stay
        moments[path] = shards.like(x.to(device, copy=True), p) if x.shape == p.shape else x.clone()
    optimizer.load_state_dict(optimizer.state_of(moments, state["step"], state["scaler"]), source)
    optimizer.slowed = float(state["slowed"])


def _check(own: dict[str, Tensor], tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], source: str) -> None:
    for file in ("weights", "optimizer", "random"):
        if file not in tensors:
            raise FastidcError(f"{source}: has no {file}.safetensors; resume from another one.")
    weights = tensors["weights"]
    for name in sorted(own.keys() ^ weights.keys()):
        raise FastidcError(f"{source}: tensor {name} is {'missing' if name in own else 'not of this model'}; resume from another one.")
    for name, x in weights.items():
        if x.shape != own[name].shape or x.dtype != own[name].dtype:
            raise FastidcError(
                f"{source}: {name} is {x.dtype} {list(x.shape)}, in this run {own[name].dtype} {list(own[name].shape)}; resume from another one."
            )
    for path in tensors["optimizer"]:
        if path.rpartition("/")[0] not in own:
            raise FastidcError(f"{source}: tensor {path} is a moment of nothing in this model; resume from another one.")
    _check_random(tensors["random"], state["processes"], source)


def _check_random(random: Mapping[str, Tensor], processes: int, source: str) -> None:
    """Of every process the generators, each of which torch takes."""
    on_host, on_device = ({f"{device}.{rank}" for rank in range(min(processes, 1 << 20))} for device in ("cpu", "cuda"))
    if not on_host <= set(random) <= on_host | on_device:
        raise FastidcError(f"{source}: random.safetensors does not hold the generators of {processes} processes; resume from another one.")
    for name, x in random.items():
        try:
            if x.dtype != torch.uint8 or x.dim() != 1:
                raise TypeError(x.dtype)
            if name.startswith("cpu."):
                torch.Generator().set_state(x)
        except (RuntimeError, TypeError):
            raise FastidcError(f"{source}: tensor {name} of random.safetensors is no generator's state; resume from another one.") from None


def put_back_random(session: Session, random: dict[str, Tensor], state: dict[str, Any]) -> None:
    """This process's generators as they were. With another number of processes nothing can be as it was: dropout then draws anew."""
    world = session.world
    if state["processes"] != world.size or f"cpu.{world.rank}" not in random:
        keys = (state["epoch"], world.rank, world.size, state["step"])
        torch.manual_seed(int(generator(session.recipe.seed, "dropout", *keys).integers(2**63)))
        return
    torch.set_rng_state(random[f"cpu.{world.rank}"].cpu())
    if session.device.type == "cuda" and f"cuda.{world.rank}" in random:
        torch.cuda.set_rng_state(random[f"cuda.{world.rank}"].cpu(), session.device)
