"""Antialiased bicubic squash as Pillow does it, the specification."""

import math

import torch
from torch import Tensor

FIXED_BITS = 32 - 8 - 2


def squash(picture: Tensor, size: int, rows_first: bool = False) -> Tensor:
    """uint8 [H, W, 3] -> [size, size, 3]: each row squashed to ``size`` columns, rounded to uint8, then each column; the other way round where
    ``rows_first``.

    The cubic with a = -0.5, as wide as the ratio where that is over 1, normalised, its weights rounded to multiples of 2^-22.
    """
    if rows_first:
        return squash(picture.transpose(0, 1), size).transpose(0, 1)
    height, width, _ = picture.shape
    middle = _mixed(weights(width, size).to(picture.device), picture.transpose(0, 1).reshape(width, -1))  # [size, H*3]
    middle = middle.view(size, height, 3).transpose(0, 1).reshape(height, -1)
    return _mixed(weights(height, size).to(picture.device), middle).view(size, size, 3)


def weights(length: int, size: int) -> Tensor:
    """[size, length] float64: 2^22 times what each output pixel takes of each input pixel, whole numbers."""
    ratio = length / size
    stretch = max(ratio, 1.0)
    out = torch.zeros(size, length, dtype=torch.float64)
    for i in range(size):
        centre = (i + 0.5) * ratio
        first = max(int(centre - 2 * stretch + 0.5), 0)
        end = min(int(centre + 2 * stretch + 0.5), length)
        taps = [_cubic((x - centre + 0.5) * (1 / stretch)) for x in range(first, end)]
        total = 0.0
        for tap in taps:  # one by one, as C adds: sum() of Python corrects its roundings
            total += tap
        out[i, first:end] = torch.tensor([_fixed(tap / total) for tap in taps], dtype=torch.float64)
    return out


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _fixed(weight: float) -> int:
    return math.trunc(math.copysign(0.5, weight) + weight * 2**FIXED_BITS)


def _mixed(weights: Tensor, levels: Tensor) -> Tensor:
    """[size, length] x uint8 [length, n] -> uint8; sums of whole numbers, which float64 holds exactly."""
    total = weights @ levels.double() + 2 ** (FIXED_BITS - 1)
    return (total / 2**FIXED_BITS).floor().clamp(0, 255).to(torch.uint8)
