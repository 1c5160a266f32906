"""Products that make their left operand once more for the backward pass: the plain product's value and gradients, and less that is kept."""

import itertools

import compare
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc import ops
from fastidc.ops.attention_linear import self_attention_linear
from fastidc.ops.gelu import gelu_linear
from fastidc.ops.post_norm import post_norm_linear

pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")

HEADS, WIDTH, OUT = 2, 32, 24


def attention(qkv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(ops.self_attention(qkv, HEADS), weight, bias)


def post_norm(x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    y = F.layer_norm(x + residual, (WIDTH,), norm_weight, norm_bias)
    return F.linear(y, weight, bias), y


# name -> (ours, the plain one, shapes of the arguments)
CASES = {
    "attention": (lambda qkv, *a: self_attention_linear(qkv, HEADS, *a), attention, [(2, 5, 3 * WIDTH), (OUT, WIDTH), (OUT,)]),
    "gelu": (gelu_linear, lambda x, *a: F.linear(F.gelu(x), *a), [(2, 5, WIDTH), (OUT, WIDTH), (OUT,)]),
    "post_norm": (
        lambda x, residual, *a: post_norm_linear(x, *a, residual=residual),
        post_norm,
        [(2, 5, WIDTH), (2, 5, WIDTH), (WIDTH,), (WIDTH,), (OUT, WIDTH), (OUT,)],
    ),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=triton,layer_norm=triton")


def given(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in CASES[name][2]]


def results(run, args: list[Tensor]) -> tuple:
    out = run(*args)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name):
    """In fp64, whichever arguments want a gradient."""
    ours, plain, shapes = CASES[name]
    every = itertools.product([True, False], repeat=len(shapes))
    for wanted in [w for w in every if any(w) and (len(w) < 4 or sum(w) in (1, len(w) - 1, len(w)))]:
        found = []
        for run in (ours, plain):
            args = [x.requires_grad_(w) for x, w in zip(given(name), wanted, strict=True)]
            out = results(run, args)
            upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype) for o in out]
            pairs = [(o, u) for o, u in zip(out, upstream, strict=True) if o.requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True))
            found.append([*out, *(x.grad for x in args)])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                compare.assert_close(a, b, compare.FP64_OP, f"{name} {wanted}")


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results(used):
    """What `post_norm_linear` returns may each go nowhere."""
    found = []
    for run in CASES["post_norm"][:2]:
        args = [x.requires_grad_() for x in given("post_norm")]
        results(run, args)[used].square().sum().backward()
        found.append([x.grad for x in args])
    for a, b in zip(*found, strict=True):
        assert a is None or b is None or compare.relative_error(a, b) < compare.FP64_OP
        assert (a is None) == (b is None)


@pytest.mark.parametrize("name", CASES)
def test_the_left_operand_is_not_kept(name):
    ours, plain, _ = CASES[name]
    kept = []
    for run in (ours, plain):
        storages = {}

        def pack(x: Tensor, storages=storages) -> Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        args = [x.requires_grad_() for x in given(name)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            held = run(*args)
        assert held is not None
        kept.append(sum(s.nbytes() for s in storages.values()))
    assert kept[1] - kept[0] >= 10 * WIDTH * 8 - 10 * 2 * 8  # ten rows, but for a norm's two statistics


@pytest.mark.parametrize("name", ["gelu", "post_norm"])
def test_autocast(name):
    """bf16 rows under autocast: weights are cast as it would, and their gradients come back in fp32."""
    ours, plain, _ = CASES[name]
    found = []
    for run in (ours, plain):
        args = [x.requires_grad_() for x in given(name, torch.float32)]
        rows = [x.bfloat16() if x.dim() == 3 else x for x in args]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = results(run, rows)
        assert out[0].dtype == torch.bfloat16
        out[0].float().square().sum().backward()
        assert all(x.grad.dtype == torch.float32 for x in args)
        found.append([out[0], *(x.grad for x in args)])
    for a, b in zip(*found, strict=True):
        assert compare.relative_error(a, b) < 2e-2


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name, monkeypatch):
    """In a graph the compiler decides what is kept: the plain operators, and no break."""
    monkeypatch.delenv("FASTIDC_BACKEND")
    torch._dynamo.reset()
    ours, plain, _ = CASES[name]
    args = [x.requires_grad_() for x in given(name)]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, args), results(plain, args), strict=True):
        compare.assert_close(a, b, compare.FP64_OP)


def test_dropout_draws_the_same_again():
    """The result made in the backward pass is that of the forward pass: with the weight's gradient alone, exactly."""
    qkv = given("attention")[0]
    eye = torch.eye(WIDTH, dtype=torch.float64).requires_grad_()
    out = self_attention_linear(qkv, HEADS, eye, None, dropout_p=0.5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    compare.assert_close(eye.grad, upstream.flatten(0, 1).T @ out.detach().flatten(0, 1), compare.FP64_OP)
