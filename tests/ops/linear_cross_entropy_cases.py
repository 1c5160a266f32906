"""What the tests of linear cross entropy share: inputs, and the loss with its three gradients."""

import torch
from attention_cases import DEVICE
from torch import Tensor

from fastidc import ops

PAD = 0
# rows, width, words: fewer than a tile, more than one, several parts of the vocabulary, several slices of columns, and none a multiple of anything
SHAPES = [(1, 24, 17), (7, 24, 33), (33, 48, 101), (130, 40, 257), (19, 300, 77), (9, 512, 65)]
NAMES = ("loss", "x", "weight", "bias")


def inputs(rows: int, width: int, words: int, *, dtype=torch.float64, scale: float = 1.0, pads: float = 0.4) -> list[Tensor]:
    """x, weight, bias, and targets of which a share of about ``pads`` is the pad id; logits are about ``scale`` wide."""
    draw = torch.Generator().manual_seed(1000 * rows + width + words)
    x, weight, bias = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((rows, width), (words, width), (words,)))
    targets = torch.randint(1, words, (rows,), generator=draw)
    targets[torch.rand(rows, generator=draw) < pads] = PAD
    return [*(given.to(DEVICE, dtype) for given in (x, weight * scale * width**-0.5, 0.3 * bias)), targets.to(DEVICE)]


def with_gradients(run, given: list[Tensor], wanted: tuple[int, ...] = (1, 1, 1)) -> list[Tensor | None]:
    """run(*given), a scalar, and the gradients of three times it, None where none is wanted."""
    *leaves, targets = given
    leaves = [x.detach().clone().requires_grad_(bool(wants)) for x, wants in zip(leaves, wanted, strict=True)]
    loss = run(*leaves, targets)
    found = iter(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad], torch.full_like(loss, 3.0)))
    return [loss.detach(), *(next(found) if wants else None for wants in wanted)]


def backend(name: str, ignore_index: int = PAD):
    return lambda x, weight, bias, targets: ops.linear_cross_entropy(x, weight, bias, targets, ignore_index=ignore_index, backend=name)


def exact(given: list[Tensor]) -> list[Tensor]:
    """The reference in float64, of the numbers given."""
    *real, targets = given
    return with_gradients(backend("reference"), [*(x.double() for x in real), targets])
