"""Patches as models make them: a gather and a view, eager and compiled, and F.unfold."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Variant


def variants() -> list[Variant]:
    return [
        Variant("index + view", lambda case: index_and_view),
        Variant("index + view compiled", lambda case: torch.compile(index_and_view, dynamic=False), compiled=True),
        Variant("index + F.unfold", lambda case: _unfold),
    ]


def index_and_view(images: Tensor, index: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """images [I, H, W, 3] uint8, index [K] -> [K, n, 3*P*P]."""
    picked = images[index].unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # [K, rows, P, columns, P, 3]
    return picked.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2).to(dtype)


def _unfold(images: Tensor, index: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    return F.unfold(images[index].permute(0, 3, 1, 2).to(dtype), patch_size, stride=patch_size).transpose(1, 2)
