"""The one-tile attention kernels: in Triton's interpreter on a CPU, for real on a GPU."""

import itertools
import math
import re

import compare
import pytest
import torch
from torch import Tensor

from fastidc import ops
from fastidc.ops import _attention_triton, _dispatch
from fastidc.reference import attention as reference

pytest.importorskip("triton")
kernels = pytest.importorskip("fastidc_kernels.attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32
EXACT_TOLERANCE = 1e-13 if DEVICE == "cpu" else compare.FP32_OP
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


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is served in the interpreter only")
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


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
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


@pytest.mark.parametrize("family", ["self 50", "packed causal", "cross 32x100", "self 100"])
def test_same_bits_twice(family):
    run, shapes = FAMILIES[family]
    inputs = [noise(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate(shapes)]
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(run, inputs), with_gradients(run, inputs), strict=True))


# ---- memory that is not ours


def surrounded(x: Tensor, margin: int = 16) -> tuple[Tensor, Tensor]:
    """x as a view into a larger buffer of NaN, and the buffer: rows before and after, columns beside."""
    shape = [n + 2 * margin if i else n + 2 for i, n in enumerate(x.shape)]
    buffer = torch.full(shape, math.nan, device=x.device, dtype=x.dtype)
    view = buffer[tuple(slice(1 if i == 0 else margin, (1 if i == 0 else margin) + n) for i, n in enumerate(x.shape))]
    view.copy_(x.detach())
    return view, buffer


@pytest.mark.parametrize("family", ["self 49", "self 100", "causal 14", "packed causal", "cross 32x100", "cross 1x7"])
def test_reads_nothing_else_and_writes_nothing_else(family):
    """Inputs between NaN, results into NaN: strided views give the bits that contiguous tensors give, and the surroundings stay NaN."""
    run, shapes = FAMILIES[family]
    heads = 2
    dense = [noise(*shape, dtype=torch.float32, seed=i).detach() for i, shape in enumerate(shapes)]
    expected = with_gradients(run, dense)
    views = [surrounded(x)[0] for x in dense]
    q, k, v = views[0].chunk(3, -1) if len(views) == 1 else (views[0], *views[1].chunk(2, -1))
    packed = family.startswith("packed")
    options = {
        "causal": "causal" in family,
        "cu_seqlens": offsets() if packed else None,
        "longest": max(CAPTIONS) if packed else 0,
        "dropout_p": 0.0,
        "seed": None,
        "faults": torch.zeros(1, dtype=torch.int32, device=DEVICE) if packed else None,
    }
    out, around = surrounded(torch.full_like(expected[0], math.nan))
    kernels.attention_fwd(q, k, v, out, heads, **options)
    assert torch.equal(out, expected[0])
    assert int((~around.isnan()).sum()) == out.numel()
    grad = surrounded(noise(*out.shape, seed=9).detach().to(out.dtype))[0]
    written = [surrounded(torch.full_like(x, math.nan)) for x in dense]
    parts = written[0][0].chunk(3, -1) if len(written) == 1 else (written[0][0], *written[1][0].chunk(2, -1))
    kernels.attention_bwd(q, k, v, grad, *parts, heads, **options)
    for (view, buffer), want in zip(written, expected[1:], strict=True):
        assert torch.equal(view, want)
        assert int((~buffer.isnan()).sum()) == view.numel()


def test_packed_sequences_do_not_see_each_other():
    """A sequence of NaN leaves its neighbours' bits alone, forward and backward; so do empty ones."""
    run, shapes = FAMILIES["packed causal"]
    x = noise(*shapes[0], dtype=torch.float32).detach()
    clean = with_gradients(run, [x])
    rows = torch.ones(len(x), dtype=torch.bool, device=DEVICE)
    rows[14:15] = rows[47:56] = False  # the third and the fifth sequence
    dirty = with_gradients(run, [torch.where(rows[:, None], x, math.nan)])
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(clean, dirty, strict=True))
    assert dirty[0][~rows].isnan().all()


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


# ---- dropout


def mask_of(seed, dropout_p: float, sequences: int = 4, heads: int = 2, rows: int = 32, columns: int = 100) -> Tensor:
    """What the kernel keeps, [S, H, rows, columns]: with equal scores and unit vectors for values, the output is the mask, scaled."""
    kept = []
    for start in range(0, columns, 32):  # 32 keys have a value of their own in one call
        q = torch.zeros(sequences, rows, heads * 32, device=DEVICE)
        values = torch.zeros(columns, 32, device=DEVICE)
        width = min(32, columns - start)
        values[start : start + width, :width] = torch.eye(width, device=DEVICE)
        kv = torch.cat([torch.zeros(columns, heads * 32, device=DEVICE), values.repeat(1, heads)], dim=-1).expand(sequences, -1, -1)
        seeds = torch.tensor(seed, device=DEVICE)
        out = ops.cross_attention(q, kv.contiguous(), heads, dropout_p=dropout_p, seed=seeds, backend="triton")
        kept.append(out.unflatten(-1, (heads, 32)).transpose(1, 2)[..., :width] > 0)
    return torch.cat(kept, dim=-1)


def test_dropout_is_the_reference_s_mask():
    for seed in ((0, 0), (-5, (7 << 33) | 3), (2**62 + 11, -1)):
        found = mask_of(seed, 0.3)
        assert torch.equal(found, reference.kept(torch.tensor(seed, device=DEVICE), 0.3, found.shape))


@pytest.mark.parametrize("family", ["causal 14", "self 100", "packed causal", "cross 32x100"])
def test_dropout_gradients(family):
    """The backward pass draws the forward pass's mask: values and gradients are the reference's."""
    _, shapes = FAMILIES[family]
    more = {"dropout_p": 0.1, "seed": torch.tensor([12, 34], device=DEVICE)}
    if family.startswith("cross"):
        run = cross_run(2, **more)
    else:
        run = self_run(2, causal="causal" in family, lengths=CAPTIONS if family.startswith("packed") else None, **more)
    inputs = [noise(*shape, dtype=EXACT, seed=i) for i, shape in enumerate(shapes)]
    expected = with_gradients(lambda *x: run(*x, backend="reference"), [x.double() for x in inputs])
    for got, want in zip(with_gradients(run, inputs), expected, strict=True):
        compare.assert_close(got, want, EXACT_TOLERANCE, family)


def test_mask_statistics():
    """As many kept as asked for, in all and at every place, and no place, head, sequence, offset or seed tells of another."""
    p, draws = 0.1, 64
    masks = torch.stack([reference.kept(torch.tensor([s, o]), p, (8, 8, 32, 100)) for s in range(8) for o in range(8)]).double()
    count = masks.numel()
    assert abs(float(masks.mean()) - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    places = masks.mean(dim=(0, 1, 2))  # [32, 100], each of 4,096 draws
    assert float((places - (1 - p)).abs().max()) < 5.5 * (p * (1 - p) / (draws * 64)) ** 0.5
    assert float(places.var() / (p * (1 - p) / (draws * 64))) == pytest.approx(1, abs=0.15)
    centred = (masks - (1 - p)) / (p * (1 - p)) ** 0.5

    def correlation(a: Tensor, b: Tensor) -> float:
        return float((a * b).mean()) * a.numel() ** 0.5  # in standard deviations

    for name, a, b in (
        ("next key", centred[..., 1:], centred[..., :-1]),
        ("next query", centred[..., 1:, :], centred[..., :-1, :]),
        ("diagonal", centred[..., 1:, 1:], centred[..., :-1, :-1]),
        ("next head", centred[:, :, 1:], centred[:, :, :-1]),
        ("next sequence", centred[:, 1:], centred[:, :-1]),
        ("next offset", centred.unflatten(0, (8, 8))[:, 1:], centred.unflatten(0, (8, 8))[:, :-1]),
        ("next seed", centred.unflatten(0, (8, 8))[1:], centred.unflatten(0, (8, 8))[:-1]),
    ):
        assert abs(correlation(a, b)) < 5, name


def test_dropout_draws_from_torch_s_generator():
    qkv = noise(2, 30, 3 * 32, dtype=torch.float32).detach()

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [ops.self_attention(qkv, 2, dropout_p=0.3, backend="triton") for _ in range(2)]

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_philox_is_philox():
    """Known answers of Random123's own test file."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(w) for w in reference.philox([zero] * 4, [zero] * 2)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in reference.philox([ones] * 4, [ones] * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


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


# ---- refusals


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: ops.self_attention(x, 5), "qkv has 96 numbers a row, which 5 heads cannot share out evenly in 3 equal parts"),
        (lambda x: ops.self_attention(x.repeat(1, 20, 1), 1, backend="triton"), "one tile holds 1 to 128 tokens, not 140"),
        (lambda x: ops.self_attention(x, 4, backend="triton"), "a head must have 16, 32, 64 or 128 numbers, not 8"),
        (lambda x: ops.self_attention(x.repeat(1, 1, 4), 1, backend="triton"), "in fp32 a head may have 64 numbers at most, not 128"),
        (lambda x: ops.self_attention(x.int(), 1, backend="triton"), "it takes fp32, fp16 and bf16, not torch.int32"),
        (lambda x: ops.self_attention(x, 1, dropout_p=1.0), "dropout_p must be at least 0 and less than 1, got 1.0"),
        (lambda x: ops.self_attention(x, 1, dropout_p=0.5, seed=torch.zeros(2)), "seed must be int64 [2] on"),
        (lambda x: ops.self_attention(x, 1, max_seqlen=3), "max_seqlen belongs to packed sequences"),
        (lambda x: ops.self_attention(x[0], 1), "sequences end to end need cu_seqlens"),
        (lambda x: ops.self_attention(x, 1, cu_seqlens=offsets((7,)), max_seqlen=7), "with cu_seqlens, qkv must be [T, 3*H*D]"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets((7,))), "cu_seqlens needs max_seqlen"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets((7,)).long(), max_seqlen=7), "cu_seqlens must be int32 [S+1]"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets((7,)).to("meta"), max_seqlen=7), "cu_seqlens is on meta and qkv on"),
        (lambda x: ops.cross_attention(x, x, 1), "q must be [B, Lq, H*D] and kv [B, Lk, 2*H*D]"),
        (lambda x: ops.cross_attention(x[..., :48].half(), x, 1), "q and kv must have one dtype and device"),
    ],
)
def test_refusals_are_sentences(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(noise(1, 7, 96, dtype=torch.float32).detach())


WRONG = {
    "must start at 0, got 1": [1, 4, 7],
    "must ascend, got 5 before 4 at index 2": [0, 5, 4, 7],
    "must end at the number of rows, 7, got 6": [0, 3, 6],
    "sequence 1 has 6 rows, more than max_seqlen 5": [0, 1, 7],
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_offsets(sentence):
    """On a CPU a sentence at once; on a GPU, where the host does not look, a flag for it to find, and nothing outside is touched."""
    wrong = torch.tensor(WRONG[sentence], dtype=torch.int32, device=DEVICE)
    qkv = noise(7, 96, dtype=torch.float32).detach()
    ops.raise_faults()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=sentence):
            ops.self_attention(qkv, 1, cu_seqlens=wrong, max_seqlen=5, backend="triton")
    options = {"causal": True, "cu_seqlens": wrong, "longest": 5, "dropout_p": 0.0, "seed": None}
    view, _ = surrounded(qkv)
    out, around = surrounded(torch.full((7, 32), math.nan, device=DEVICE))
    faults = _attention_triton._faults_of(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    kernels.attention_fwd(*view.chunk(3, -1), out, 1, faults=faults, **options)
    assert int((~around.isnan()).sum()) == int((~out.isnan()).sum())
    with pytest.raises(ValueError, match="packed attention met cu_seqlens that do not ascend"):
        ops.raise_faults()
    ops.raise_faults()  # once is enough


def test_dispatch_of_triton():
    """Who serves where: asked without a device."""
    attention = _dispatch.OPS["attention"]

    def spec(**facts):
        base = {"op": "attention", "device": "cuda", "dtype": torch.bfloat16, "grad": True, "arch": 90}
        return _dispatch.Spec(**(base | {"head_dim": 64, "query_length": 50, "key_length": 50} | facts))

    assert attention.order(spec())[0] == "triton"
    assert attention.order(spec(dtype=torch.float32))[0] == "sdpa"
    assert attention.resolve(spec(query_length=197, key_length=197), "auto") == "sdpa"
    refusals = {name: " ".join(sentences) for name, sentences in attention.explain(spec(arch=75)).items()}
    assert "needs compute capability 8.0 or newer, and this device has 7.5" in refusals["triton"] or DEVICE == "cpu"
    assert attention.resolve(spec(device="cpu", dtype=torch.float32), "auto") == "sdpa"
