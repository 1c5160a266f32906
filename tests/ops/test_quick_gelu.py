"""The kernels of bias + QuickGELU: in Triton's interpreter on a CPU, for real on a GPU."""

import math
import re

import compare
import pytest
import torch
from attention_cases import DEVICE, EXACT, INTERPRETED, WHERE, noise, surrounded
from torch import Tensor

from fastidc import ops
from fastidc.ops import _quick_gelu_triton
from fastidc.ops.quick_gelu import quick_gelu_linear, sums_bias

pytestmark = WHERE
TOLERANCE = 1e-13 if DEVICE == "cpu" else 3e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUT_OFF = 2 if DEVICE == "cpu" else 1  # Triton's interpreter cuts bf16 off where a GPU rounds: twice the error
SHAPES = [(1, 1), (1, 3072), (7, 96), (5, 7, 48), (37, 64), (130, 24), (3, 1500), (300, 8)]
NAMES = ("out", "x", "bias")


def inputs(*shape: int, bias: bool = True, dtype=EXACT, scale: float = 2.0) -> list[Tensor]:
    given = [noise(*shape, seed=1, scale=scale), *([noise(shape[-1], seed=2)] if bias else [])]
    return [x.detach().to(dtype) for x in given]


def backend(name: str):
    return lambda x, bias=None: ops.quick_gelu(x, bias, backend=name)


def with_gradients(run, given: list[Tensor]) -> dict[str, Tensor]:
    """run(*given) and the gradients of its product with fixed noise."""
    given = [x.detach().clone().requires_grad_() for x in given]
    out = run(*given)
    found = [out.detach(), *torch.autograd.grad(out, given, noise(*out.shape, seed=9).detach().to(out.dtype))]
    return dict(zip(NAMES, found))


def exact(given: list[Tensor]) -> dict[str, Tensor]:
    """The reference in float64, of the numbers given."""
    return with_gradients(backend("reference"), [x.double() for x in given])


ours = backend("triton")


# ---- values and gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_exact(shape, bias):
    given = inputs(*shape, bias=bias)
    got, want = with_gradients(ours, given), exact(given)
    for name in want:
        compare.assert_close(got[name], want[name], TOLERANCE, name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_no_worse_than_torch(dtype, bias):
    """Error against float64 at most twice that of torch in the same dtype."""
    given = inputs(37, 96, bias=bias, dtype=dtype)
    peer = with_gradients(backend("reference"), given)  # as users write it, every operator rounding
    got, want, times = with_gradients(ours, given), exact(given), 2 * (CUT_OFF if dtype == torch.bfloat16 else 1)
    for name in want:
        assert got[name].dtype == dtype
        compare.assert_close(got[name], want[name], times * compare.relative_error(peer[name], want[name]) + 1e-7, name)


@INTERPRETED
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    assert torch.autograd.gradcheck(ours, [x.requires_grad_() for x in inputs(5, 24, bias=bias)], fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1])
def test_partial_gradients(wanted):
    given = inputs(7, 24)
    full = list(with_gradients(ours, given).values())[1:]
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(given)]
    out = ours(*alone)
    (got,) = torch.autograd.grad(out, alone[wanted], noise(7, 24, seed=9).detach().to(out.dtype))
    assert torch.equal(got, full[wanted])


# ---- before a product


@pytest.mark.parametrize("bias", [True, False])
def test_before_a_product(bias):
    """The same numbers where the activations are not kept, with every gradient, all at once and alone."""
    given = [*inputs(5, 7, 24, bias=bias), noise(10, 24, seed=5).detach().to(EXACT), noise(10, seed=6).detach().to(EXACT)]

    def gradients(name: str, wanting) -> tuple:
        leaves = [y.detach().clone().requires_grad_(i in wanting) for i, y in enumerate(given)]
        x, *rest = leaves
        rest = rest if bias else [None, *rest]
        out = quick_gelu_linear(x, *rest, backend=name)
        return out, *torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanting])

    for wanting in (range(len(given)), *([i] for i in range(len(given)))):
        for a, b in zip(gradients("triton", wanting), gradients("torch", wanting), strict=True):
            compare.assert_close(a, b, 10 * TOLERANCE)


def test_before_a_product_keeps_x_alone():
    x, bias = (y.requires_grad_() for y in inputs(9, 96))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        quick_gelu_linear(x, bias, noise(10, 96, seed=5).to(EXACT), None, backend="triton")
    (of_rows,) = (y for y in kept if y.shape[0] == 9)
    assert of_rows.data_ptr() == x.data_ptr()


def test_who_adds_the_bias(monkeypatch):
    """The product before it, but where the activation's kernel sums its gradient."""
    x = inputs(3, 24, dtype=torch.float32)[0]
    for chosen, expected in (("quick_gelu=torch", False), ("quick_gelu=triton", True)):
        monkeypatch.setenv("FASTIDC_BACKEND", chosen)
        assert sums_bias(x) == expected
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not sums_bias(x), "the product is of another dtype"


# ---- extremes


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_far_out():
    """x where the sigmoid is 0 or 1 to the last place; its tails and their derivatives are 0 or x and 1, and finite."""
    x = torch.tensor([[-1e30, -1e4, -90.0, 0.0, 90.0, 1e4, 1e30]], device=DEVICE)
    got = with_gradients(ours, [x])
    assert torch.equal(got["out"], torch.where(x > 0, x, 0.0))
    slope = with_gradients(lambda y: ours(y), [x])["x"] / noise(1, 7, seed=9).detach().float()
    torch.testing.assert_close(slope, torch.where(x > 0, 1.0, torch.where(x == 0, 0.5, 0.0)))


def test_no_rows():
    got = with_gradients(ours, inputs(0, 24))
    assert got["out"].shape == got["x"].shape == (0, 24)
    assert not got["bias"].any()


# ---- memory that is not ours, determinism, registration


def test_reads_nothing_else():
    """Inputs between NaN and with strides give the bits that dense ones give."""
    given = inputs(37, 40, dtype=torch.float32)
    dense = with_gradients(ours, given)
    grad = noise(37, 40, seed=9).detach().float()
    for views in ([surrounded(x)[0] for x in given], [given[0].T.contiguous().T, given[1]]):
        views = [x.detach().requires_grad_() for x in views]
        out = ours(*views)
        found = [out.detach(), *torch.autograd.grad(out, views, surrounded(grad)[0])]
        assert all(torch.equal(a, b) for a, b in zip(found, dense.values(), strict=True))


def test_writes_every_place(monkeypatch):
    """Results and parts come as NaN from the allocator, and none is left."""
    given = inputs(37, 40, dtype=torch.float32)
    dense = with_gradients(ours, given)
    allocate = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape, **more: allocate(self, *shape, **more).fill_(math.nan))
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(ours, given).values(), dense.values(), strict=True))


def test_same_bits_twice():
    given = inputs(130, 48, dtype=torch.bfloat16)
    first, second = with_gradients(ours, given), with_gradients(ours, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, *rest = (x.requires_grad_() for x in inputs(5, 24, bias=bias, dtype=torch.float32))
    rest = rest[0] if rest else None
    torch.library.opcheck(_quick_gelu_triton.quick_gelu_fwd, (x, rest), atol=1e-5, rtol=1e-5)
    plain = (x.detach(), None if rest is None else rest.detach())
    for again in (True, False):
        torch.library.opcheck(_quick_gelu_triton.quick_gelu_bwd, (plain[0], *plain, bias, again), atol=1e-5, rtol=1e-5)


def test_compiles_without_a_break():
    given = inputs(9, 24, dtype=torch.float32)
    compiled = torch.compile(lambda x, bias: ours(2 * x, bias.sin()).square(), fullgraph=True, backend="aot_eager")
    want = with_gradients(lambda x, bias: ops.quick_gelu(2 * x, bias.sin(), backend="torch").square(), given)
    for name, got in with_gradients(compiled, given).items():
        compare.assert_close(got, want[name], 5 * compare.FP32_OP, name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, b: (x, b[:8]), "bias must be [24], got [8]"),
        (lambda x, b: (x.int(), b), "x must be floating-point [..., C] with C at least 1, got torch.int32 [7, 24]"),
        (lambda x, b: (x[:, :0], None), "C at least 1, got torch.float32 [7, 0]"),
    ],
)
def test_refusals_are_sentences(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ours(*change(*inputs(7, 24, dtype=torch.float32)))
