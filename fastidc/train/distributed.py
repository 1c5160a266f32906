"""One process or many: what torchrun set up, and the few things that processes tell each other outside a training step."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from fastidc.errors import FastidcError, LostPeerError
from fastidc.train.meeting import meet

T = TypeVar("T")
# Processes wait for the first one while it scores captions, whose METEOR is a Java program; 30 minutes, torch's default, has been too short for people.
_PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class World:
    """This process among ``size`` processes. With one there is no process group, and everything below costs nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def local_size(self) -> int:
        """Processes of this host."""
        return _variable("LOCAL_WORLD_SIZE", self.size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> "dist.ProcessGroup | None":
        return None if self.size == 1 else dist.group.WORLD

    def share(self, items: list[T]) -> list[T]:
        """This process's part of ``items``: every ``size``-th, so that parts are alike."""
        return items[self.rank :: self.size]

    def gather_rows(self, part: Tensor) -> Tensor | None:
        """Undoes `share` for rows: [N / size, E] on each process -> [N, E] on the CPU of the first one, None on the others."""
        part = part.detach().cpu().contiguous()
        if self.size == 1:
            return part
        # as one array a process: pickled row by row, every row would take the storage of all of them with it
        parts: list | None = [None] * self.size if self.is_main else None
        dist.gather_object(part.numpy(), parts, dst=0)
        if parts is None:
            return None
        out = torch.empty(sum(len(p) for p in parts), *part.shape[1:], dtype=part.dtype)
        for rank, rows in enumerate(parts):
            out[rank :: self.size] = torch.from_numpy(rows)
        return out

    def gather(self, part: list[T]) -> list[T] | None:
        """Undoes `share` for plain values: all of them in their order on the first process, None on the others."""
        if self.size == 1:
            return part
        parts: list | None = [None] * self.size if self.is_main else None
        dist.gather_object(part, parts, dst=0)
        if parts is None:
            return None
        return [parts[i % self.size][i // self.size] for i in range(sum(len(p) for p in parts))]

    def gather_everywhere(self, value: T) -> list[T]:
        """Every process's value, on all of them."""
        values: list = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The first process's value on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The first process's named tensors, on all of them, one after another on ``device``. All have to take them all."""
        facts = self.broadcast(None if tensors is None else [(name, tuple(x.shape), x.dtype) for name, x in tensors.items()])
        for name, shape, dtype in facts:
            x = tensors[name].to(device) if self.is_main else torch.empty(shape, dtype=dtype, device=device)
            if self.size > 1:
                dist.broadcast(x, src=0)
            yield name, x

    def on_main(self, run: Callable[[], T]) -> T:
        """``run()`` on the first process, its value on all. Its error is told to all of them, so that none waits for ever: a FastidcError is
        raised on each, and so is an OSError, as one; another one is raised where it happened, and on the others as a FastidcError."""
        value: Any = None
        error: str | None = None
        unforeseen: Exception | None = None
        if self.is_main:
            try:
                value = run()
            except FastidcError as refusal:
                error = str(refusal)
            except OSError as refusal:
                error = f"{refusal.filename or 'a file'} cannot be used ({refusal.strerror or refusal}); choose another folder, or take it away."
            except Exception as other:
                unforeseen, error = other, f"the first process failed with {type(other).__name__}: {other}"
        value, error = self.broadcast((value, error))
        if unforeseen is not None:
            raise unforeseen
        if error is not None:
            raise FastidcError(error)
        return value

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


ALONE = World()


def is_main_process() -> bool:
    """Whether this process is the one that talks, also before a process group exists."""
    return os.environ.get("RANK", "0") == "0"


def speaks(error: BaseException) -> bool:
    """Whether this process is to show ``error``: the first one is, and whoever lost another."""
    return is_main_process() or isinstance(error, LostPeerError)


def _variable(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise FastidcError(f"the environment variable {name} is {value!r}; torchrun sets it to a whole number.") from None


@contextmanager
def processes(device: str) -> Iterator[tuple[World, torch.device]]:
    """This process's `World` and its device ("auto", "cpu" or "cuda"), for as long as the block runs.

    torchrun says by RANK, WORLD_SIZE and LOCAL_RANK how many processes there are; without it there is one, and no process group.
    NCCL joins GPUs, gloo CPUs. FastidcError where the device is absent or this machine has fewer GPUs than processes.
    """
    size = _variable("WORLD_SIZE", 1)
    world = World(_variable("RANK", 0), size, _variable("LOCAL_RANK", 0))
    if (
        size > 1
        and not dist.is_initialized()
        and (unset := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ])
    ):
        raise FastidcError(
            f"WORLD_SIZE is {size}, but {' and '.join(unset)} not set; start the processes with torchrun, or unset WORLD_SIZE."
        )
    chosen = choose_device(device, world)
    if size == 1 or dist.is_initialized():  # a caller's own group is used, and left to the caller
        yield world, chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    store = meet(store, rank, size, _PATIENCE)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield world, chosen
    except (dist.DistError, RuntimeError) as error:
        if (sign := _sign_of_a_peer(error)) is None:
            raise
        raise LostPeerError(
            f"process {world.rank} of {size} lost another one ({sign}); what that one said last tells why, and then the run has to be started "
            "again."
        ) from error
    finally:
        dist.destroy_process_group()


def _sign_of_a_peer(error: Exception) -> str | None:
    """What says that a collective failed because another process is gone or silent, None where nothing does; gloo says it in plain
    RuntimeErrors, between a path of its own and advice."""
    text = str(error)
    for sign in ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe"):
        if sign in text:
            return sign.lower()
    return text.splitlines()[0] if isinstance(error, dist.DistError) or "gloo" in text else None


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """ "auto" is CUDA where there is a device; FastidcError where the named one is absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise FastidcError(f"unknown device {name!r}; choose one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise FastidcError("device cuda was asked for, but torch sees no CUDA device; use --device cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world.size == 1:
        return torch.device("cuda")
    if world.local_rank >= torch.cuda.device_count():
        raise FastidcError(
            f"process {world.local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            "start no more processes than GPUs (torchrun --nproc_per_node), or use --device cpu."
        )
    return torch.device("cuda", world.local_rank)
