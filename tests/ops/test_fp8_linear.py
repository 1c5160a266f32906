"""The product in FP8 against its specification, which rounds in plain torch; on CUDA where the hardware has it."""

import importlib.util
import sys

import compare
import pytest
import torch
from attention_cases import DEVICE, noise, surrounded
from torch import Tensor

from fastidc import ops
from fastidc.ops.fp8_linear import LEAST_SCALE, fp8_linear, fp8_linear_bwd, fp8_linear_fwd, in_fp8, linear, quantised, unsupported
from fastidc.ops.layer_norm import layer_norm_linear
from fastidc.ops.quick_gelu import quick_gelu_linear
from fastidc.reference.fp8_linear import fp8_linear as reference
from fastidc.reference.fp8_linear import rounded

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and bool(unsupported(torch.device(DEVICE))),
    reason="this GPU does not multiply in FP8: run it on an Ada, Hopper or Blackwell one, or without a GPU",
)
NAMES = ("y", "x", "weight", "bias")
SHAPES = [((1, 16), 16), ((7, 32), 48), ((3, 5, 96), 288), ((130, 768), 64), ((64, 64), 32)]
# Of eight bits nothing is left to differ: both sum the same numbers, in fp32 here and in fp64 there. A GPU's fast accumulators keep 14 bits.
SAME = 5e-7 if DEVICE == "cpu" else 2e-3


def inputs(shape, outputs: int, dtype=torch.float32, bias: bool = True, scale: float = 1.0) -> list[Tensor]:
    given = [noise(*shape, seed=1, scale=scale), noise(outputs, shape[-1], seed=2, scale=0.1), *([noise(outputs, seed=3)] if bias else [])]
    return [x.detach().to(dtype) for x in given]


def with_gradients(run, given: list[Tensor], wanted=None) -> dict[str, Tensor]:
    """run(*given) and the gradients of its product with fixed noise."""
    wanted = range(len(given)) if wanted is None else wanted
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(given)]
    out = run(*leaves)
    grads = torch.autograd.grad(out, [leaves[i] for i in wanted], noise(*out.shape, seed=9).detach().to(out.dtype))
    return {"y": out.detach()} | {NAMES[1 + i]: grad for i, grad in zip(wanted, grads, strict=True)}


def exact(given: list[Tensor]) -> dict[str, Tensor]:
    """The specification's numbers, summed in float64. Its cotangent is that of the dtype given."""
    dtype = given[0].dtype

    leaves = [x.detach().double().requires_grad_() for x in given]
    out = reference(*leaves)
    cotangent = noise(*out.shape, seed=9).detach().to(dtype).double()
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]))


# ---- values and gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES, ids=str)
def test_is_the_specification(shape, outputs, bias):
    given = inputs(shape, outputs, bias=bias)
    got, want = with_gradients(ops.fp8_linear, given), exact(given)
    for name in want:
        compare.assert_close(got[name], want[name], SAME, name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES[1:], ids=str)
def test_bf16(shape, outputs, bias):
    """Only the result is rounded to bf16, and the gradient of weights is the bf16 product's."""
    given = inputs(shape, outputs, torch.bfloat16, bias)
    got, want = with_gradients(ops.fp8_linear, given), exact(given)
    for name in want:
        assert got[name].dtype == torch.bfloat16
        compare.assert_close(got[name], want[name], 4e-3 + SAME, name)


def test_error_of_eight_bits():
    """What the flag costs: a product of noise is off by 3.8 percent, and so is the gradient of x; that of the weights is not."""
    given = inputs((256, 512), 256)
    got, plain = with_gradients(ops.fp8_linear, given), with_gradients(torch.nn.functional.linear, given)
    errors = {name: compare.relative_error(got[name], plain[name]) for name in plain}
    assert 0.03 < errors["x"] < 0.045
    assert 0.02 < errors["y"] < 0.045
    assert errors["weight"] < 1e-6
    assert errors["bias"] < 1e-6


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_partial_gradients(wanted):
    given = inputs((7, 32), 48)
    full, got = with_gradients(ops.fp8_linear, given), with_gradients(ops.fp8_linear, given, wanted)
    assert set(got) == {"y", *(NAMES[1 + i] for i in wanted)}
    assert all(torch.equal(got[name], full[name]) for name in got)


def test_the_specification_rounds():
    """Scales by hand: 896 and 448 divide by 2 and by 1, 449 by 2; three bits of mantissa are left."""
    x = torch.tensor([[896.0, 2.0], [448.0, 17.0], [449.0, 1.0], [0.0, 0.0]])
    assert rounded(x).tolist() == [[896.0, 2.0], [448.0, 16.0], [448.0, 1.0], [0.0, 0.0]]
    e4m3, scale = quantised(x)
    assert scale.flatten().tolist() == [2.0, 1.0, 2.0, LEAST_SCALE]
    assert torch.equal(e4m3.float() * scale, rounded(x))


# ---- extremes


def test_zero_rows():
    x, weight, bias = inputs((7, 32), 48)
    x[2], weight[5] = 0, 0
    got, want = with_gradients(ops.fp8_linear, [x, weight, bias]), exact([x, weight, bias])
    assert torch.equal(got["y"][2], bias)
    assert torch.equal(got["y"][:, 5], bias[5].expand(7))
    for name in want:
        assert bool(got[name].isfinite().all())
        compare.assert_close(got[name], want[name], SAME, name)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.fp8_linear(leaf, weight, bias), leaf, torch.zeros(7, 48, device=DEVICE))
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny(scale, dtype):
    """Rows bring their own scale: nothing saturates or vanishes that bf16 would hold."""
    given = inputs((7, 32), 48, dtype, bias=False, scale=scale)
    got, want = with_gradients(ops.fp8_linear, given), exact(given)
    for name in want:
        compare.assert_close(got[name] / (1 if name == "x" else scale), want[name] / (1 if name == "x" else scale), 4e-3 + SAME, name)


def test_the_largest_numbers():
    x = torch.full((4, 16), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=DEVICE)
    e4m3, scale = quantised(x)
    assert bool(e4m3.float().isfinite().all())
    assert bool(((e4m3.float() * scale).isfinite() | (e4m3.float() == 256)).all())


def test_what_is_not_finite_shows():
    x, weight, bias = inputs((4, 16), 32)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    finite = ops.fp8_linear(x, weight, bias).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False, True]


def test_no_rows():
    got = with_gradients(ops.fp8_linear, inputs((0, 32), 48))
    assert got["y"].shape == (0, 48)
    assert got["x"].shape == (0, 32)
    assert not got["weight"].any()


# ---- memory that is not ours, determinism, registration


def test_strides_change_nothing():
    given = inputs((40, 32), 48)
    dense = with_gradients(ops.fp8_linear, given)
    turned = [x.T.contiguous().T if x.dim() == 2 else x for x in given]
    for views in ([surrounded(x)[0] for x in given], turned):
        leaves = [x.detach().requires_grad_() for x in views]
        out = ops.fp8_linear(*leaves)
        assert torch.equal(out, dense["y"])
        grad = surrounded(noise(*out.shape, seed=9).detach().float())[0]
        for name, got in zip(NAMES[1:], torch.autograd.grad(out, leaves, grad), strict=True):
            compare.assert_close(got, dense[name], compare.FP32_OP, name)


def test_same_bits_twice():
    given = inputs((130, 48), 64, torch.bfloat16)
    first, second = with_gradients(ops.fp8_linear, given), with_gradients(ops.fp8_linear, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, weight, *rest = (t.requires_grad_() for t in inputs((3, 5, 32), 48, bias=bias))
    torch.library.opcheck(fp8_linear_fwd, (x, weight, rest[0] if rest else None), atol=1e-5, rtol=1e-5)
    torch.library.opcheck(fp8_linear_bwd, (noise(3, 5, 48, seed=4).detach().float(), weight.detach()), atol=1e-5, rtol=1e-5)


def test_compiles_without_a_break():
    given = inputs((5, 7, 32), 48)

    def run(x, weight, bias):
        return linear(x.sin(), weight, bias, 1).sin()

    def through(call):
        def run(*tensors):
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return call(*tensors)

        return with_gradients(run, given)

    got, want = through(torch.compile(run, fullgraph=True, backend="aot_eager")), through(run)
    for name in want:
        assert got[name].dtype == want[name].dtype
        compare.assert_close(got[name], want[name], 1e-6, name)


def test_the_compiler_quantises_wherever_the_op_runs(monkeypatch):
    """On CUDA the op calls a compiled function. Here it does too: forward, backward, inside a compiled graph; the same bits from one graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(x, weight, bias):
        return fp8_linear(x.sin(), weight, bias).cos()

    quantise = torch.compile(quantised, dynamic=True, fullgraph=True, backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for shape, outputs in (((7, 32), 48), ((3, 5, 64), 16), ((130, 48), 96)):
        given = inputs(shape, outputs, torch.bfloat16)
        monkeypatch.setattr(sys.modules["fastidc.ops.fp8_linear"], "_quantiser", lambda device: quantised)
        want = with_gradients(call, given)
        monkeypatch.setattr(sys.modules["fastidc.ops.fp8_linear"], "_quantiser", lambda device: quantise)
        for run in (call, compiled):
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=shape[0] == 7):
                got = with_gradients(run, given)
            assert all(torch.equal(got[name], want[name]) for name in want)
    assert len(graphs) <= 2, "torch gives up at eight"
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_kernel_gives_the_same_bits():
    kernel = torch.compile(quantised, dynamic=True)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((7, 32), (130, 768), (1, 16)):
            x = noise(*shape, seed=5).detach().to(dtype)
            x[0] = 0
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(kernel(x), quantised(x), strict=True))


# ---- which products


def test_which_products_run_in_fp8():
    x = torch.randn(8, 4, 32, device=DEVICE)
    assert not in_fp8(x, None)
    assert not in_fp8(x, 1), "fp32 products stay fp32"
    assert in_fp8(x.bfloat16(), 32)
    assert not in_fp8(x.bfloat16(), 33)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert in_fp8(x, 32)
    if DEVICE == "cpu":
        with torch.autocast("cpu", dtype=torch.float16):
            assert not in_fp8(x, 1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton: install the package triton")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows", [None, 1])
def test_inside_the_ops_before_a_product(backend, rows, monkeypatch):
    """LayerNorm's and QuickGELU's ops with an FP8 product are those ops, kept apart, and that product: every gradient, wherever they are made."""
    products, module = [], sys.modules["fastidc.ops.fp8_linear"]
    run_product = module._product
    monkeypatch.setattr(module, "_product", lambda *given, fast: products.append(fast) or run_product(*given, fast=fast))
    x, weight, _ = inputs((5, 7, 32), 48, torch.bfloat16)
    norm, norm_bias, bias = (noise(n, seed=i).detach().bfloat16() for i, n in enumerate((32, 32, 48), start=5))

    def fused(x, norm, norm_bias, weight, bias):
        out, s = layer_norm_linear(x, norm, norm_bias, weight, bias, residual=x.sin(), backend=backend, fp8_rows=rows)
        return out + quick_gelu_linear(s, norm_bias, weight, bias, backend=backend, fp8_rows=rows)

    def apart(x, norm, norm_bias, weight, bias):
        normalised, s = ops.layer_norm(x, norm, norm_bias, residual=x.sin(), backend=backend)
        return linear(normalised, weight, bias, rows) + linear(ops.quick_gelu(s, norm_bias, backend=backend), weight, bias, rows)

    found = []
    for run in (fused, apart):
        products.clear()
        leaves = [t.detach().requires_grad_() for t in (x, norm, norm_bias, weight, bias)]
        out = run(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, noise(*out.shape, seed=9).detach().bfloat16())])
        assert products == ([] if rows is None else [True, True, False, False]), "two forward, two backward"
    for a, b in zip(*found, strict=True):
        compare.assert_close(a, b, 4e-3)


def test_linear_without_is_torch_s():
    given = inputs((7, 32), 48)
    assert torch.equal(linear(*given), torch.nn.functional.linear(*given))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "sentence"),
    [
        (torch.zeros(4, 32), torch.zeros(48, 32, dtype=torch.bfloat16), None, "must all be bfloat16 or all float32"),
        (torch.zeros(4, 32).half(), torch.zeros(48, 32).half(), None, "must all be bfloat16 or all float32, got torch.float16"),
        (torch.zeros(4, 16), torch.zeros(48, 32), None, r"weight \[N, K\], got \[4, 16\] and \[48, 32\]"),
        (torch.zeros(4, 32), torch.zeros(48, 32), torch.zeros(32), r"bias must be \[48\]"),
        (torch.zeros(4, 24), torch.zeros(48, 24), None, r"multiples of 16, got weight \[48, 24\]"),
    ],
)
def test_refusals(x, weight, bias, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.fp8_linear(x, weight, bias)
