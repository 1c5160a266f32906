"""Images of a batch that are more than pixels: rows of a store that holds them all, and what is to be done to them on the way."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastidc.packed import moved


class Store:
    """Images that stay where they are, uint8 [I, H, W, 3] on one device. No part of a batch: moving or copying one leaves it alone, and a captured
    step reads it in place. Equal to itself alone."""

    def __init__(self, pixels: Tensor):
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels must be uint8 [I, H, W, 3], got {pixels.dtype} {list(pixels.shape)}.")
        self.pixels = pixels


@dataclass(frozen=True)
class Picked:
    """K images of each of B samples, in the place of pixels [B, K, H, W, 3] where a batch has these alone."""

    source: Tensor | Store
    """The samples' own pixels, uint8 [B, K, H, W, 3], or the store that ``index`` points into."""
    index: Tensor | None = None
    """int64 [B, K], rows of the store."""
    augmentation: Tensor | None = None
    """fp32 [B, K, 15], see `fastidc.ops.patches`; None changes no pixel."""

    def __post_init__(self):
        if isinstance(self.source, Store) != (self.index is not None):
            raise ValueError("images picked from a store need an index, and a sample's own pixels take none.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, H, W, 3)"""
        return tuple(self.source.shape) if self.index is None else (*self.index.shape, *self.source.pixels.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> "Picked":
        """Those samples, neighbours."""
        source = self.source if self.index is not None else self.source[rows]
        return Picked(source, *(None if x is None else x[rows] for x in (self.index, self.augmentation)))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Picked":
        """On ``device``; a store stays, and must be there."""
        return moved(self, device)

    def pin_memory(self) -> "Picked":
        """In page-locked memory, what is in the host's."""
        parts = (self.source, self.index, self.augmentation)
        return Picked(*(x.pin_memory() if isinstance(x, Tensor) and x.device.type == "cpu" else x for x in parts))

    def flat(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `fastidc.ops.patches` reads, sample after sample: images [I, H, W, 3], index [B*K] (None: all, in order), augmentation
        [B*K, 15] or None."""
        augmentation = None if self.augmentation is None else self.augmentation.flatten(0, 1)
        if self.index is None:
            return self.source.flatten(0, 1), None, augmentation
        return self.source.pixels, self.index.flatten(), augmentation
