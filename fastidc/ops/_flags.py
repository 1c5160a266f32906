"""Flags on a device that kernels raise and nobody reads while a step runs."""

import torch
from torch import Tensor


class Flag:
    """int32 [1] a device, kept, so that a captured graph can write to it; 0 is nothing."""

    def __init__(self):
        self._made: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The one that kernels on ``device`` raise."""
        if device not in self._made:
            self._made[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._made[device]

    def take(self) -> list[int]:
        """What was raised since the last call, which is forgotten. Waits for the devices."""
        found = [int(flag) for flag in self._made.values()]
        for flag in self._made.values():
            flag.zero_()
        return [value for value in found if value]
