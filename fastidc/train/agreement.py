"""What any process has noticed between two steps, told to all of them, without a wait for the device."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import distributed as dist

from fastidc.train.distributed import World


class Agreement:
    """``noticed()`` gives this process's numbers; `read` the largest of all processes', the same on each.

    With several processes they travel on a group of the CPU's own, while the next step runs: what is told after one step is read after the
    next, so nobody waits. With one process it is told at once.
    """

    def __init__(self, world: World, noticed: Callable[[], Sequence[int]]):
        self._world, self._noticed = world, noticed
        self._group = None if world.size == 1 else dist.new_group(backend="gloo", timeout=timedelta(hours=4))
        self._waiting: tuple[dist.Work, torch.Tensor] | None = None

    def read(self) -> list[int]:
        """What was told at the last `tell`; zeros before the first."""
        if self._world.size == 1:
            return list(self._noticed())
        if self._waiting is None:
            return [0] * len(self._noticed())
        work, values = self._waiting
        work.wait()
        self._waiting = None
        return values.tolist()

    def tell(self) -> None:
        if self._world.size > 1:
            values = torch.tensor(list(self._noticed()), dtype=torch.int64)
            self._waiting = dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group, async_op=True), values

    def now(self) -> list[int]:
        """What all have noticed up to this moment; every process waits for the others."""
        before = self.read()
        self.tell()
        return [max(pair) for pair in zip(before, self.read(), strict=True)]
