"""Decoded pictures of any size as images of one size, as Pillow makes them."""

import functools
import importlib.metadata
from collections.abc import Sequence

import torch
from torch import Tensor

from fastidc.ops import _patches_cuda as cuda_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of
from fastidc.reference import squash as reference


def squash(pictures: Sequence[Tensor], size: int, *, backend: str = "auto") -> Tensor:
    """Antialiased bicubic squash, the installed Pillow's ``resize((size, size), BICUBIC)`` to the bit.

    pictures: uint8 [H, W, 3] each, of any size, on one device; strides are free, so ``decoded.permute(1, 2, 0)`` of a decoder's [3, H, W] is
    as good -> uint8 [K, size, size, 3]. ValueError, in sentences, for what is none of that and where ``backend`` cannot serve. The kernel
    reads pictures on torch's current stream by their addresses; it is not for a captured graph.
    """
    pictures = list(pictures)
    if not pictures or size < 1:
        raise ValueError(f"squash takes at least one picture and a size of at least 1, got {len(pictures)} and {size}.")
    for i, x in enumerate(pictures):
        if x.dtype != torch.uint8 or x.dim() != 3 or x.shape[2] != 3 or not x.shape[0] or not x.shape[1] or x.device != pictures[0].device:
            raise ValueError(
                f"picture {i} must be uint8 [H, W, 3] on {pictures[0].device}, with pixels, got {x.dtype} {list(x.shape)} on {x.device}."
            )
    device = pictures[0].device
    return op(Spec("squash", device.type, torch.uint8, False, arch_of(device)), backend)(
        pictures, size, [rows_first(*x.shape[:2], size) for x in pictures]
    )


def rows_first(height: int, width: int, size: int) -> bool:
    """Whether the installed Pillow squashes the height before the width: from version 13 on, where the height loses more than twice as many
    pixels as the width. Rounding in between lets it be seen: in photographs by a level here and there."""
    return _pillow() >= 13 and height - size > max(2 * (width - size), 0)


@functools.cache
def _pillow() -> int:
    return int(importlib.metadata.version("pillow").partition(".")[0])


def _reference(pictures: list[Tensor], size: int, rows_first: list[bool]) -> Tensor:
    return torch.stack([reference.squash(picture, size, first) for picture, first in zip(pictures, rows_first, strict=True)])


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet. Elsewhere there is Pillow, and the reference for tests."""
    return ("cuda", "reference") if spec.device == "cuda" else ("reference",)


op = Op(
    "squash",
    [Backend("cuda", cuda_backend.squash, cuda_backend.squash_unsupported), Backend("reference", _reference)],
    order=_order,
)
