"""What the tests of attention share: where they run, inputs, and every family of shapes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastidc import ops

pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHERE = [pytest.mark.gpu] if DEVICE == "cuda" else []  # on a GPU they are `pytest -m gpu`, elsewhere the interpreter runs them
INTERPRETED = pytest.mark.skipif(
    DEVICE == "cuda", reason="this is of Triton's interpreter (float64, bf16): run it on a machine without a GPU"
)
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32
EXACT_TOLERANCE = 1e-13 if DEVICE == "cpu" else 2e-6
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LENGTHS = (1, 7, 17, 33, 49, 50, 77, 100, 128)
CAPTIONS = (14, 0, 1, 32, 9, 0, 18)  # tokens of packed sequences


def noise(*shape: int, dtype=torch.float64, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype).requires_grad_()


def offsets(lengths=CAPTIONS) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def with_gradients(run, inputs: list[Tensor]) -> list[Tensor]:
    """run(*inputs) and the gradients of its product with fixed noise."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, noise(*out.shape, seed=9).detach().to(out.dtype))]


def self_run(heads: int, causal: bool = False, lengths=None, **more):
    packed = {} if lengths is None else {"cu_seqlens": offsets(lengths), "max_seqlen": max(max(lengths), 1)}
    return lambda qkv, backend="triton": ops.self_attention(qkv, heads, causal=causal, backend=backend, **packed, **more)


def cross_run(heads: int, **more):
    return lambda q, kv, backend="triton": ops.cross_attention(q, kv, heads, backend=backend, **more)


# every family of shapes: the call, and the shapes of its inputs
FAMILIES = {
    **{f"self {n}": (self_run(2), [(2, n, 3 * 64)]) for n in LENGTHS},
    **{f"causal {n}": (self_run(2, causal=True), [(2, n, 3 * 64)]) for n in (1, 14, 32, 33, 77)},
    "self D=64": (self_run(1), [(2, 50, 3 * 64)]),
    "self D=128": (self_run(1, causal=True), [(1, 33, 3 * 128)]),
    "self D=16": (self_run(3), [(2, 10, 3 * 48)]),
    "packed causal": (self_run(2, causal=True, lengths=CAPTIONS), [(sum(CAPTIONS), 3 * 64)]),
    "packed": (self_run(2, lengths=CAPTIONS), [(sum(CAPTIONS), 3 * 64)]),
    "cross 32x100": (cross_run(2), [(2, 32, 64), (2, 100, 128)]),
    "cross 1x7": (cross_run(2), [(2, 1, 64), (2, 7, 128)]),
    "cross 64x5": (cross_run(2), [(2, 64, 64), (2, 5, 128)]),
}
SMALL = ("self 7", "causal 14", "packed causal", "packed", "cross 1x7")


def surrounded(x: Tensor, margin: int = 16) -> tuple[Tensor, Tensor]:
    """x as a view into a larger buffer of NaN, and the buffer: rows before and after, columns beside."""
    shape = [n + 2 * margin if i else n + 2 for i, n in enumerate(x.shape)]
    buffer = torch.full(shape, math.nan, device=x.device, dtype=x.dtype)
    view = buffer[tuple(slice(1 if i == 0 else margin, (1 if i == 0 else margin) + n) for i, n in enumerate(x.shape))]
    view.copy_(x.detach())
    return view, buffer
