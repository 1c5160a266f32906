"""The kernels of residual + LayerNorm: in Triton's interpreter on a CPU, for real on a GPU."""

import math
import re

import compare
import pytest
import torch
from attention_cases import DEVICE, EXACT, INTERPRETED, WHERE, noise, surrounded
from torch import Tensor
from torch.nn import functional as F

from fastidc import ops
from fastidc.ops import _layer_norm_triton
from fastidc.ops.layer_norm import layer_norm_linear

pytestmark = WHERE
TOLERANCE = 1e-12 if DEVICE == "cpu" else 5e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUT_OFF = 2 if DEVICE == "cpu" else 1  # Triton's interpreter cuts bf16 off where a GPU rounds: twice the error
SHAPES = [(1, 1), (1, 768), (7, 96), (5, 7, 48), (37, 512), (130, 24), (9, 640), (3, 1024), (300, 8)]
NAMES = ("normalised", "s", "x", "weight", "bias", "residual")


def inputs(*shape: int, residual: bool = True, dtype=EXACT, weights=None, offset: float = 0.0, scale: float = 1.0) -> list[Tensor]:
    """x, weight, bias and perhaps residual; the weights in fp32 where x is in half precision, as under autocast."""
    weights = weights or (dtype if dtype.itemsize >= 4 else torch.float32)
    width = shape[-1]
    given = [noise(*shape, seed=1, scale=scale) + offset, 1 + 0.3 * noise(width, seed=2), 0.3 * noise(width, seed=3)]
    given += [noise(*shape, seed=4, scale=scale)] if residual else []
    return [x.detach().to(weights if i in (1, 2) else dtype) for i, x in enumerate(given)]


def backend(name: str, eps: float = 1e-5):
    """(x, weight, bias[, residual]) -> (normalised, s), or the normalised tensor alone."""
    return lambda x, weight, bias, residual=None: ops.layer_norm(x, weight, bias, residual=residual, eps=eps, backend=name)


def with_gradients(run, given: list[Tensor]) -> dict[str, Tensor]:
    """What run(*given) returns, and the gradients of its product with fixed noise."""
    given = [x.detach().clone().requires_grad_() for x in given]
    outs = run(*given)
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [noise(*out.shape, seed=9 + i).detach().to(out.dtype) for i, out in enumerate(outs)]
    found = [*(out.detach() for out in outs), *torch.autograd.grad(outs, given, cotangents)]
    names = NAMES if len(given) == 4 else (NAMES[0], *NAMES[2:5])
    return dict(zip(names, found, strict=True))


def exact(given: list[Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """The reference in float64, of the numbers given."""
    return with_gradients(backend("reference", eps), [x.double() for x in given])


ours = backend("triton")


# ---- values and gradients


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_exact(shape, residual):
    """Values and every gradient against the reference in float64, to its last places."""
    given = inputs(*shape, residual=residual)
    got, want = with_gradients(ours, given), exact(given)
    for name in want:
        error = float((got[name].double() - want[name]).norm())
        assert error <= TOLERANCE * (1 + float(want[name].norm())), f"{name} is off by {error:.3g}"


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None):
    """As users write it: one operator for the sum and one for the norm, which takes statistics in fp32 by itself."""
    s = x if residual is None else x + residual
    normalised = F.layer_norm(s, weight.shape, weight.to(s.dtype), bias.to(s.dtype))
    return normalised if residual is None else (normalised, s)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_no_worse_than_torch(dtype, residual, offset):
    """Error against float64 at most twice that of torch in the same dtype; ``offset``: rows far from 0."""
    given = inputs(37, 96, residual=residual, dtype=dtype, weights=dtype, offset=offset)
    got, peer, want = with_gradients(ours, given), with_gradients(plain, given), exact(given)
    for name in want:
        assert got[name].dtype == dtype
        times = 2 * (CUT_OFF if dtype == torch.bfloat16 else 1)
        allowed = times * compare.relative_error(peer[name], want[name]) + 4 * torch.finfo(torch.float32).eps
        compare.assert_close(got[name], want[name], allowed, name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_stay_fp32(dtype):
    """Half-precision rows with fp32 weights, as under autocast: their gradients are fp32 and not rounded."""
    given = inputs(37, 96, residual=False, dtype=dtype)
    got, want = with_gradients(ours, given), with_gradients(backend("torch"), given)
    for name in ("weight", "bias"):
        assert got[name].dtype == torch.float32
        compare.assert_close(got[name], want[name], 1e-6, name)
    for name in ("normalised", "x"):
        compare.assert_close(got[name], want[name], 2 * torch.finfo(dtype).eps, name)


@INTERPRETED
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(residual):
    given = [x.requires_grad_() for x in inputs(5, 24, residual=residual)]
    assert torch.autograd.gradcheck(ours, given, fast_mode=True)


@pytest.mark.parametrize("wanted", range(4))
def test_partial_gradients(wanted):
    given = inputs(7, 24)
    full = list(with_gradients(ours, given).values())[2:]
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(given)]
    outs = ours(*alone)
    cotangents = [noise(*out.shape, seed=9 + i).detach().to(out.dtype) for i, out in enumerate(outs)]
    if wanted in (1, 2):  # s does not depend on the weights
        outs, cotangents = outs[:1], cotangents[:1]
    (got,) = torch.autograd.grad(outs, alone[wanted], cotangents)
    compare.assert_close(got, full[wanted], 1e-14)


@pytest.mark.parametrize("read", [0, 1])
def test_one_output_is_read(read):
    """A post-norm layer reads the normalised rows alone; and where s alone is read its gradient passes."""
    given = [x.requires_grad_(i in (0, 3) or read == 0) for i, x in enumerate(inputs(7, 24))]
    wanting = [x for x in given if x.requires_grad]
    got, want = (torch.autograd.grad(backend(name)(*given)[read].square().sum(), wanting) for name in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        compare.assert_close(a, b, TOLERANCE)


# ---- before a product


def through(name: str, residual: bool):
    def run(x, weight, bias, product, product_bias, *residual):
        out, s = layer_norm_linear(x, weight, bias, product, product_bias, residual=residual[0] if residual else None, backend=name)
        return out, s

    return run


@pytest.mark.parametrize("residual", [True, False])
def test_before_a_product(residual):
    """The same numbers where the normalised rows are not kept, with every gradient, all at once and alone."""
    x, weight, bias, *rest = inputs(5, 7, 24, residual=residual)
    given = [x, weight, bias, noise(10, 24, seed=5).detach().to(EXACT), noise(10, seed=6).detach().to(EXACT), *rest]

    def gradients(name: str, wanting) -> tuple:
        leaves = [y.detach().clone().requires_grad_(i in wanting) for i, y in enumerate(given)]
        out, s = through(name, residual)(*leaves)
        loss = out.square().sum() + (s * s.detach().sin()).sum()
        return out, s, *torch.autograd.grad(loss, [leaves[i] for i in wanting])

    for wanting in (range(len(given)), *([i] for i in range(len(given)))):
        for a, b in zip(gradients("triton", wanting), gradients("torch", wanting), strict=True):
            compare.assert_close(a, b, TOLERANCE)


def test_before_a_product_under_autocast():
    """Casts, dtypes and gradients are those of autocast."""
    x, weight, bias, residual = inputs(9, 96, dtype=torch.bfloat16)
    given = [x, weight, bias, noise(10, 96, seed=5).detach().float(), noise(10, seed=6).detach().float(), residual]
    found = {}
    for name in ("triton", "torch"):
        leaves = [y.detach().clone().requires_grad_() for y in given]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out, s = through(name, True)(*leaves)
        found[name] = [out, s, *torch.autograd.grad(out.float().square().sum() + s.float().sum(), leaves)]
    for a, b in zip(found["triton"], found["torch"], strict=True):
        assert a.dtype == b.dtype
        compare.assert_close(a, b, 2e-2)


def test_before_a_product_keeps_s_alone():
    """Of the rows, the backward pass is left s and two numbers each."""
    x, weight, bias, residual = (y.requires_grad_() for y in inputs(9, 96))
    product = noise(10, 96, seed=5).to(EXACT)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        _, s = layer_norm_linear(x, weight, bias, product, None, residual=residual, backend="triton")
    of_rows = [y for y in kept if y.shape[0] == 9]
    assert [tuple(y.shape) for y in of_rows] == [(9, 96), (9,), (9,)]
    assert of_rows[0].data_ptr() == s.data_ptr()


# ---- extremes


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_constant_rows(eps):
    """No variance at all: the result is the bias, and nothing is infinite."""
    given = inputs(4, 96, dtype=torch.float32, scale=0.0)
    given[0][1] = 3.0
    got = with_gradients(backend("triton", eps), given)
    assert torch.equal(got["normalised"], given[2].expand(4, -1))
    assert all(bool(x.isfinite().all()) for x in got.values())


def test_eps_of_the_captioner():
    given = inputs(7, 48, scale=1e-4)
    got, want = with_gradients(backend("triton", 1e-12), given), exact(given, 1e-12)
    for name in want:
        compare.assert_close(got[name], want[name], 10 * TOLERANCE, name)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_huge_offsets(offset):
    """Variance from differences: a mean of squares would have lost everything here."""
    given = inputs(9, 512, residual=False, dtype=torch.float32, offset=offset)
    got, peer, want = with_gradients(ours, given), with_gradients(plain, given), exact(given)
    for name in want:
        compare.assert_close(got[name], want[name], 2 * compare.relative_error(peer[name], want[name]) + 1e-6, name)


def test_no_rows():
    given = inputs(0, 24)
    got = with_gradients(ours, given)
    assert got["normalised"].shape == got["x"].shape == (0, 24)
    assert not got["weight"].any()
    assert not got["bias"].any()


# ---- memory that is not ours, determinism, registration


def test_reads_nothing_else():
    """Inputs between NaN and with strides give the bits that dense ones give."""
    given = inputs(37, 40, dtype=torch.float32)
    dense = with_gradients(ours, given)
    grads = [noise(37, 40, seed=9 + i).detach().float() for i in range(2)]
    turned = [x.T.contiguous().T if x.dim() == 2 else x for x in given]
    for views in ([surrounded(x)[0] for x in given], turned):
        views = [x.detach().requires_grad_() for x in views]
        outs = ours(*views)
        found = [*(x.detach() for x in outs), *torch.autograd.grad(outs, views, [surrounded(x)[0] for x in grads])]
        assert all(torch.equal(a, b) for a, b in zip(found, dense.values(), strict=True))


def test_writes_every_place(monkeypatch):
    """Results and parts come as NaN from the allocator, and none is left."""
    given = inputs(37, 40, dtype=torch.float32)
    dense = with_gradients(ours, given)
    allocate = Tensor.new_empty

    def poisoned(self, *shape, **more):
        return allocate(self, *shape, **more).fill_(math.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(ours, given).values(), dense.values(), strict=True))


def test_same_bits_twice():
    given = inputs(130, 48, dtype=torch.bfloat16)
    first, second = with_gradients(ours, given), with_gradients(ours, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual):
    x, weight, bias, *rest = (x.requires_grad_() for x in inputs(5, 24, residual=residual, dtype=torch.float32))
    rest = rest[0] if rest else None
    torch.library.opcheck(_layer_norm_triton.layer_norm_fwd, (x, rest, weight, bias, 1e-5), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        y, s, mean, rstd = _layer_norm_triton.layer_norm_fwd(x, rest, weight, bias, 1e-5)
        s = s if residual else x.detach()
        for again in (True, False):
            call = (y, y if residual else None, s, mean, rstd, weight.detach(), bias.detach() if again else None, again, again)
            torch.library.opcheck(_layer_norm_triton.layer_norm_bwd, call, atol=1e-5, rtol=1e-5)


def test_compiles_without_a_break():
    given = inputs(9, 24, dtype=torch.float32)

    def run(name: str):
        def call(x, weight, bias, residual):
            y, s = ops.layer_norm(x.sin(), weight, bias, residual=residual, backend=name)
            return (y * s).square(), s

        return call

    compiled = torch.compile(run("triton"), fullgraph=True, backend="aot_eager")
    got, want = with_gradients(compiled, given), with_gradients(run("torch"), given)
    for name in want:
        compare.assert_close(got[name], want[name], 5 * compare.FP32_OP, name)


def test_a_compiler_has_torch_s(monkeypatch):
    """Within a graph "auto" is what the compiler can fuse; a name given by argument or environment holds there too."""
    graphs = []

    def seen(graph, example):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    given = inputs(9, 24, dtype=torch.float32)
    for chosen, expected in (("", False), ("layer_norm=triton", True)):
        monkeypatch.setenv("FASTIDC_BACKEND", chosen)
        torch._dynamo.reset()
        torch.compile(lambda *x: ops.layer_norm(*x[:3], residual=x[3]), fullgraph=True, backend=seen)(*given)
        assert any("fastidc" in name for name in graphs[-1]) == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, b, r: (x, w[:8], b, r), "weight and bias must both be [24] and of one dtype, got torch.float32 [8]"),
        (lambda x, w, b, r: (x, w.half(), b, r), "of one dtype, got torch.float16 [24] and torch.float32 [24]"),
        (lambda x, w, b, r: (x, w, b, r[:3]), "residual must be as x is, torch.float32 [7, 24] on"),
        (lambda x, w, b, r: (x, w, b, r.half()), "got torch.float16 [7, 24] on"),
        (lambda x, w, b, r: (x.int(), w, b, r), "x must be floating-point [..., C] with C at least 1, got torch.int32 [7, 24]"),
        (lambda x, w, b, r: (x[:, :0], w[:0], b[:0], r[:, :0]), "C at least 1, got torch.float32 [7, 0]"),
        (lambda x, w, b, r: (x.repeat(1, 50), w.repeat(50), b.repeat(50), None), "a row may have 1024 numbers at most, not 1200"),
    ],
)
def test_refusals_are_sentences(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ours(*change(*inputs(7, 24, dtype=torch.float32)))
