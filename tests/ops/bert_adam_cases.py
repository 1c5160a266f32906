"""What the tests of the optimiser's step share: parameters in two groups, gradients, and the comparison with the reference."""

import math

import compare
import pytest
import torch
from attention_cases import DEVICE
from torch import Tensor

from fastidc import ops

BACKENDS = ("triton", "torch", "reference")
SIZES = ((1,), (7,), (1000,), (4097,), (33, 129), (2048,))
CONSTANTS = (
    {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2},
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
)


def noise(shape, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


class Optimiser:
    """Parameters in two groups with their moments, and a step."""

    def __init__(self, backend: str = "triton", sizes=SIZES, shadow: torch.dtype | None = None, max_norm: float | None = None):
        self.backend, self.max_norm = backend, max_norm
        self.params = [noise(shape, seed) for seed, shape in enumerate(sizes)]
        self.first, self.second = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.shadows = None if shadow is None else [torch.full_like(p, math.nan, dtype=shadow) for p in self.params]
        self.step = ops.BertAdamStep()

    def groups(self, grads: list[Tensor]) -> list[ops.BertAdamGroup]:
        out = []
        for i, constants in enumerate(CONSTANTS):
            parts = [x[i::2] for x in (self.params, grads, self.first, self.second)]
            shadows = None if self.shadows is None else self.shadows[i::2]
            out.append(ops.BertAdamGroup(*parts, **constants, max_norm=self.max_norm, shadows=shadows))
        return out

    def __call__(self, grads: list[Tensor], lrs=(1e-2, 3e-3), **options) -> Tensor:
        return self.step(self.groups(grads), lrs, backend=self.backend, **options)

    @property
    def state(self) -> list[Tensor]:
        return [*self.params, *self.first, *self.second]


def gradients(step: int, dtype=torch.float32, sizes=SIZES) -> list[Tensor]:
    """Of another size at every step; one of them is 0 now and then."""
    out = [noise(shape, 100 * step + i, 10.0 ** (step % 3 - 2)).to(dtype) for i, shape in enumerate(sizes)]
    out[step % len(sizes)].mul_(step % 2)
    return out


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-6, name: str = "") -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        compare.assert_close(a, b, tolerance, f"{name} tensor {i}")


def agree(steps: int, clip_norm, max_norm, backend: str = "triton", dtype=torch.float32) -> None:
    ours, theirs = Optimiser(backend, max_norm=max_norm), Optimiser("reference", max_norm=max_norm)
    start = [p.clone() for p in ours.params]
    for step in range(steps):
        lrs = [rate * step / 100 for rate in (1e-2, 3e-3)]
        norm = ours(gradients(step, dtype), lrs, clip_norm=clip_norm)
        want = theirs([g.float() for g in gradients(step, dtype)], lrs, clip_norm=clip_norm)
        assert float(norm) == pytest.approx(float(want), rel=1e-6)
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(ours.params, start, strict=True)), "the first step has rate 0"
            assert all(m.any() for m in ours.first[1:])
    assert_same(ours.state, theirs.state)
