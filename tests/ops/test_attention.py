"""The one-tile attention kernels: in Triton's interpreter on a CPU, for real on a GPU."""

import compare
import pytest
import torch
from attention_cases import (
    DEVICE,
    DTYPES,
    EXACT,
    EXACT_TOLERANCE,
    FAMILIES,
    INTERPRETED,
    SMALL,
    WHERE,
    noise,
    offsets,
    self_run,
    with_gradients,
)
from torch import Tensor

from fastidc import ops
from fastidc.ops import _attention_triton

pytestmark = WHERE


@pytest.mark.parametrize("family", FAMILIES)
def test_is_exact(family):
    """Forward and every gradient against the reference in float64, to its last places."""
    run, shapes = FAMILIES[family]
    inputs = [noise(*shape, dtype=EXACT, seed=i) for i, shape in enumerate(shapes)]
    expected = with_gradients(lambda *x: run(*x, backend="reference"), [x.double() for x in inputs])
    for name, got, want in zip(("out", "first", "second"), with_gradients(run, inputs), expected, strict=False):
        compare.assert_close(got, want, EXACT_TOLERANCE, f"{family}: {name}")


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["self 50", "self 100", "causal 32", "packed causal", "cross 32x100", "self D=64"])
def test_rounds_no_worse_than_torch(family, dtype, scale):
    """Error against float64 at most twice that of products and a softmax in the same dtype, forward and every gradient."""
    run, shapes = FAMILIES[family]
    inputs = [noise(*shape, dtype=dtype, seed=i, scale=scale) for i, shape in enumerate(shapes)]
    exact = with_gradients(lambda *x: run(*x, backend="reference"), [x.double() for x in inputs])
    plain = with_gradients(lambda *x: run(*x, backend="torch"), inputs)
    ours = with_gradients(run, inputs)
    for name, got, peer, want in zip(("out", "first", "second"), ours, plain, exact, strict=False):
        limit = 2 * compare.relative_error(peer, want) + torch.finfo(dtype).eps / 8
        compare.assert_close(got, want, limit, f"{family}: {name}")


@INTERPRETED
@pytest.mark.parametrize("family", SMALL)
def test_gradcheck(family):
    run, shapes = FAMILIES[family]
    assert torch.autograd.gradcheck(run, [noise(*shape, seed=i) for i, shape in enumerate(shapes)], fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1])
def test_partial_gradients(wanted):
    run, shapes = FAMILIES["cross 32x100"]
    inputs = [noise(*shape, dtype=EXACT, seed=i) for i, shape in enumerate(shapes)]
    full = with_gradients(run, inputs)
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    out = run(*alone)
    (got,) = torch.autograd.grad(out, alone[wanted], noise(*out.shape, seed=9).detach().to(out.dtype))
    assert torch.equal(got, full[1 + wanted])


@pytest.mark.parametrize("dropout_p", [pytest.param(0.0, marks=pytest.mark.slow), 0.25])
def test_opcheck(dropout_p):
    seed = torch.tensor([3, 4], device=DEVICE) if dropout_p else None
    qkv, packed, q, kv = (noise(*shape, dtype=torch.float32).detach() for shape in ((2, 7, 96), (9, 96), (2, 3, 32), (2, 5, 64)))
    calls = {
        "self_attention_fwd": [(qkv, 2, True, None, 0, dropout_p, seed), (packed, 2, True, offsets((4, 5)), 5, dropout_p, seed)],
        "self_attention_bwd": [(qkv[..., :32].clone(), qkv, 2, True, None, 0, dropout_p, seed)],
        "cross_attention_fwd": [(q, kv, 2, dropout_p, seed)],
        "cross_attention_bwd": [(q.clone(), q, kv, 2, dropout_p, seed)],
    }
    for name, every in calls.items():
        for arguments in every:
            wants = [
                x.clone().requires_grad_() if name.endswith("fwd") and isinstance(x, Tensor) and x.is_floating_point() else x
                for x in arguments
            ]
            torch.library.opcheck(getattr(_attention_triton, name), tuple(wants), atol=1e-5, rtol=1e-5)


def test_compiles_without_a_break():
    qkv, q, kv = noise(2, 9, 96, dtype=torch.float32), noise(2, 3, 32, dtype=torch.float32), noise(2, 5, 64, dtype=torch.float32)

    def both(qkv, q, kv, backend="triton"):
        first = ops.self_attention(2 * qkv, 2, causal=True, backend=backend).sin()
        return first.sum() + ops.cross_attention(q, kv, 2, backend=backend).cos().sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    wanted = with_gradients(lambda *x: both(*x, backend="sdpa")[None], [qkv, q, kv])
    for got, want in zip(with_gradients(lambda *x: compiled(*x)[None], [qkv, q, kv]), wanted, strict=True):
        compare.assert_close(got, want, compare.FP32_OP * 5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_graph_serves_other_lengths(dynamic):
    """The longest caption differs from batch to batch; the choice of a backend is no reason to stop."""

    def run(qkv, ends, longest):
        return ops.self_attention(2 * qkv, 2, causal=True, cu_seqlens=ends, max_seqlen=longest, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ((3, 0, 7, 1), (5, 5, 5, 5), (9, 2, 1, 24), (1, 1, 1, 12)):
        qkv = noise(sum(lengths), 96, dtype=torch.float32)
        assert torch.equal(compiled(qkv, offsets(lengths), max(lengths)), run(qkv, offsets(lengths), max(lengths)))


def test_compiled_dropout_draws_anew():
    qkv = noise(2, 9, 96, dtype=torch.float32).detach()
    compiled = torch.compile(lambda x: ops.self_attention(x, 2, dropout_p=0.5, backend="triton"), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(qkv), compiled(qkv))


def test_autocast_hands_every_backend_the_same():
    q, kv = noise(2, 3, 32, dtype=torch.float32).detach(), noise(2, 5, 64, dtype=torch.float32).detach()
    with torch.autocast(DEVICE, torch.float16):
        for backend in ("triton", "sdpa", "torch"):
            assert ops.cross_attention(q, kv.half(), 2, backend=backend).dtype == torch.float16


@pytest.mark.parametrize("family", ["self 50", "packed causal", "cross 32x100", "self 100"])
def test_same_bits_twice(family):
    run, shapes = FAMILIES[family]
    inputs = [noise(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate(shapes)]
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(run, inputs), with_gradients(run, inputs), strict=True))


def test_extremes():
    """Scores of 1e4, identical rows, one token, no sequence at all."""
    run = self_run(2)
    x = noise(1, 50, 3 * 64, dtype=torch.float32, scale=100).detach()
    assert all(t.isfinite().all() for t in with_gradients(run, [x]))
    same = noise(1, 1, 3 * 64, dtype=EXACT).detach().expand(1, 33, -1)
    compare.assert_close(run(same), same[..., 128:], EXACT_TOLERANCE)
    one = noise(3, 1, 3 * 64, dtype=torch.float32).detach()
    assert torch.equal(run(one), one[..., 128:])
    assert run(x[:0]).shape == (0, 50, 64)
    nothing = ops.self_attention(x[0, :0], 2, cu_seqlens=offsets(()), max_seqlen=4, backend="triton")
    assert nothing.shape == (0, 64)
    cotangent = torch.ones((), device=DEVICE).expand(1, 50, 64)  # what sum() sends back: one number with no strides
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(run(leaf), leaf, cotangent)
    (want,) = torch.autograd.grad(run(leaf), leaf, cotangent.contiguous())
    assert torch.equal(got, want)


# ---- what only a GPU can hold or do


@pytest.mark.gpu
def test_two_hundred_thousand_sequences():
    """2.3 billion numbers: offsets past 2^31 and more sequences than a grid has in y; the same rows packed give the same bits."""
    sequences, length, heads = 200_000, 5, 12
    qkv = torch.randn(sequences, length, 3 * heads * 64, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    grad = torch.randn(sequences, length, heads * 64, device="cuda", dtype=torch.bfloat16)
    out, dqkv = _both(lambda x: ops.self_attention(x, heads, causal=True, backend="triton"), qkv, grad)
    for part in (slice(0, 3), slice(99_999, 100_003), slice(sequences - 3, sequences)):
        few, dfew = _both(lambda x: ops.self_attention(x, heads, causal=True, backend="triton"), qkv[part].clone(), grad[part])
        assert torch.equal(out[part], few)
        assert torch.equal(dqkv[part], dfew)
    ends = torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device="cuda")

    def packed(x: Tensor) -> Tensor:
        return ops.self_attention(x, heads, causal=True, cu_seqlens=ends, max_seqlen=length, backend="triton")

    again, dagain = _both(packed, qkv.flatten(0, 1), grad.flatten(0, 1))
    assert torch.equal(again.view_as(out), out)
    assert torch.equal(dagain.view_as(dqkv), dqkv)
    ops.raise_faults()


def _both(run, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = run(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    return out.detach(), dx


@pytest.mark.gpu
def test_a_replayed_graph_draws_anew():
    qkv = torch.randn(4, 50, 3 * 64, device="cuda", dtype=torch.bfloat16)
    ops.self_attention(qkv, 1, dropout_p=0.5, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.self_attention(qkv, 1, dropout_p=0.5, backend="triton")
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(out.clone())
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


@pytest.mark.gpu
def test_a_graph_of_packed_captions_replays():
    """Offsets are device data: other lengths in the same buffers need no new capture."""
    x = torch.randn(32, 96, device="cuda", dtype=torch.float16)
    ends = torch.tensor([0, 20, 32, 32], dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        return ops.self_attention(x, 1, causal=True, cu_seqlens=ends, max_seqlen=20, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lengths in ([0, 20, 32, 32], [0, 7, 12, 32]):
        ends.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, run())
    ops.raise_faults()
