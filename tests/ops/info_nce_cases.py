"""What the tests of InfoNCE share: inputs, and the loss with its three gradients."""

import math

import torch
from attention_cases import DEVICE
from torch import Tensor

from fastidc import ops

LARGEST = math.log(100.0)  # of logit_scale, where OpenAI's weights stand and where training clamps it
SHAPES = [(1, 24), (7, 24), (33, 64), (130, 24), (257, 64), (33, 512)]
NAMES = ("loss", "text", "pair", "logit_scale")


def inputs(rows: int, width: int, scale: float = LARGEST, *, dtype=torch.float64, alike: float = 0.1, cone: float = 0.0) -> list[Tensor]:
    """text, pair [rows, width] and logit_scale; pairs hold ``alike`` of their text, and all vectors ``cone`` of one direction."""
    draw = torch.Generator().manual_seed(1000 * rows + width)
    text, rest, common = (torch.randn(n, width, generator=draw, dtype=torch.float64) for n in (rows, rows, 1))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    text, pair = text + cone * common, alike * text + rest + cone * common
    return [text.to(DEVICE, dtype), pair.to(DEVICE, dtype), torch.tensor(scale, dtype=exact, device=DEVICE)]


def with_gradients(run, given: list[Tensor]) -> list[Tensor]:
    """run(*given), a scalar, and the gradients of three times it."""
    given = [x.detach().clone().requires_grad_() for x in given]
    loss = run(*given)
    return [loss.detach(), *torch.autograd.grad(loss, given, torch.full_like(loss, 3.0))]


def backend(name: str):
    return lambda text, pair, logit_scale: ops.info_nce(text, pair, logit_scale, backend=name)


def exact(given: list[Tensor]) -> list[Tensor]:
    """The reference in float64, of the numbers given."""
    return with_gradients(backend("reference"), [x.double() for x in given])
