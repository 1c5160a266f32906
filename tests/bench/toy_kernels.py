"""Small kernels that the ahead-of-time gate is tested on; each is bad in one way, but for the first two."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, M: tl.constexpr, K: tl.constexpr):
    """[M, K] x [K, M] on tensor cores."""
    rows, inner = tl.arange(0, M), tl.arange(0, K)
    x = tl.load(a + rows[:, None] * K + inner[None, :])
    y = tl.load(b + inner[:, None] * M + rows[None, :])
    tl.store(c + rows[:, None] * M + rows[None, :], tl.dot(x, y))


@triton.jit
def copy(source, target, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(target + at, tl.load(source + at))


@triton.jit
def spilling(a, b, c, M: tl.constexpr, K: tl.constexpr):
    """A tile of products far beyond the registers of one warp."""
    rows, inner = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for k in range(8):
        x = tl.load(a + rows[:, None] * K + inner[None, :] + k)
        y = tl.load(b + inner[:, None] * M + rows[None, :] + k)
        total += tl.dot(x, y)
    tl.store(c + rows[:, None] * M + rows[None, :], tl.exp(total))


@triton.jit
def greedy(a, b, c, M: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr):
    """Many stages of large tiles: more shared memory than there is."""
    rows, inner = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for k in range(STEPS):
        x = tl.load(a + rows[:, None] * (K * STEPS) + k * K + inner[None, :])
        y = tl.load(b + (k * K + inner[:, None]) * M + rows[None, :])
        total += tl.dot(x, y)
    tl.store(c + rows[:, None] * M + rows[None, :], total)
