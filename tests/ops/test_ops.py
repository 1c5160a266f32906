"""Every op: each backend against the fp64 reference, gradients by name, refusals, dispatch."""

import compare
import pytest
import torch

from fastidc import ops
from fastidc.errors import FastidcError
from fastidc.ops import _dispatch
from fastidc.reference import attention as reference_attention
from fastidc.reference import bert_adam as reference_bert_adam

torch.manual_seed(0)


def tensors(*shapes, dtype, scale=1.0):
    g = torch.Generator().manual_seed(7)
    return [(scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


# name -> (public op with backend, inputs)
CASES = {
    "self_attention": (lambda x, backend: ops.self_attention(x, 4, backend=backend), [(3, 50, 3 * 64)]),
    "causal_attention": (lambda x, backend: ops.self_attention(x, 4, causal=True, backend=backend), [(3, 14, 3 * 64)]),
    "attention_length_1": (lambda x, backend: ops.self_attention(x, 2, causal=True, backend=backend), [(2, 1, 3 * 32)]),
    "cross_attention": (lambda q, kv, backend: ops.cross_attention(q, kv, 4, backend=backend), [(3, 14, 64), (3, 100, 128)]),
    "info_nce": (ops.info_nce, [(9, 24), (9, 24), ()]),
    "info_nce_one": (ops.info_nce, [(1, 24), (1, 24), ()]),
    "layer_norm": (ops.layer_norm, [(5, 7, 48), (48,), (48,)]),
    "layer_norm_residual": (
        lambda x, w, b, r, backend: torch.stack(ops.layer_norm(x, w, b, residual=r, eps=1e-12, backend=backend)),
        [(5, 48), (48,), (48,), (5, 48)],
    ),
    "quick_gelu": (ops.quick_gelu, [(5, 48)]),
    "quick_gelu_bias": (ops.quick_gelu, [(5, 48), (48,)]),
    "linear_cross_entropy": (
        lambda x, w, b, backend: ops.linear_cross_entropy(x, w, b, torch.tensor([3, 0, 5, 16, 0, 1]), backend=backend),
        [(6, 24), (17, 24), (17,)],
    ),
    "linear_cross_entropy_all_ignored": (
        lambda x, w, b, backend: ops.linear_cross_entropy(x, w, b, torch.zeros(6, dtype=torch.long), backend=backend),
        [(6, 24), (17, 24), (17,)],
    ),
}
NAMES = {case: next(n for n in sorted(_dispatch.OPS, key=len, reverse=True) if n in case) for case in CASES}
# What Triton serves has tests of its own (test_attention.py); xformers needs a GPU (test_gpu.py).
ELSEWHERE = ("triton", "xformers")
BACKENDS = [(case, name) for case, op in NAMES.items() for name in (*_dispatch.OPS[op].backends, "auto") if name not in ELSEWHERE]


def values_and_gradients(run, inputs, backend):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*inputs, backend=backend)
    cotangent = (
        torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype) if out.dim() else torch.ones_like(out)
    )
    return out, torch.autograd.grad(out, inputs, cotangent, allow_unused=False)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("case", "backend"), BACKENDS)
def test_against_fp64_reference(case, backend, dtype, scale):
    if scale == 100.0 and "attention" in case and dtype == torch.float32:
        scale = 3.0  # a softmax over scores of 1e4 is an arg-max: fp32 rounding of the scores decides it, in any implementation
    run, shapes = CASES[case]
    scale = 1.0 if case.startswith("info_nce") else scale  # the last input is a logarithm
    expected, expected_grads = values_and_gradients(run, tensors(*shapes, dtype=torch.float64, scale=scale), "reference")
    actual, grads = values_and_gradients(run, tensors(*shapes, dtype=dtype, scale=scale), backend)
    tolerance = compare.FP64_OP if dtype == torch.float64 else compare.FP32_OP
    compare.assert_close(actual, expected, tolerance, case)
    largest = max(float(g.norm()) for g in expected_grads)
    for index, (got, want) in enumerate(zip(grads, expected_grads, strict=True)):
        error = float((got.double() - want).norm())
        assert error <= 20 * tolerance * max(float(want.norm()), 1e-3 * largest, 1e-6), f"gradient {index} of {case}: off by {error:.3g}"


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    run, shapes = CASES[case]
    small = [tuple(min(n, 6) if i == 1 and len(shape) == 3 else n for i, n in enumerate(shape)) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: run(*x, backend="auto"), tensors(*small, dtype=torch.float64), fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_partial_gradients(case):
    """Each input alone may ask for a gradient."""
    run, shapes = CASES[case]
    inputs = tensors(*shapes, dtype=torch.float64)
    _, full = values_and_gradients(run, inputs, "auto")
    for i, want in enumerate(full):
        alone = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
        out = run(*alone, backend="auto")
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape) if out.dim() else torch.ones_like(out)
        compare.assert_close(torch.autograd.grad(out, alone[i], cotangent)[0], want, 1e-10, f"{case}[{i}]")


def test_attention_dropout_keeps_the_mean():
    qkv = torch.randn(2, 30, 3 * 32)
    for backend in ("sdpa", "torch"):
        mean = torch.stack([ops.self_attention(qkv, 2, dropout_p=0.3, backend=backend) for _ in range(3000)]).mean(0)
        assert compare.relative_error(mean, ops.self_attention(qkv, 2)) < 0.05


def test_attention_matches_formula():
    """The reference itself, against the definition written with loops."""
    q, k, v = (torch.randn(1, n, 8, dtype=torch.float64) for n in (3, 5, 5))
    out = reference_attention.attention(q, k, v, 2)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        for i in range(3):
            weights = torch.stack([(q[0, i, part] * k[0, j, part]).sum() / 2 for j in range(5)]).exp()
            compare.assert_close(out[0, i, part], (weights[:, None] * v[0, :, part]).sum(0) / weights.sum(), 1e-12)


def test_bert_adam_backends_agree_over_100_steps():
    g = torch.Generator().manual_seed(3)
    runs = {}
    for backend in ("torch", "reference"):
        g.manual_seed(3)
        params = [torch.randn(s, generator=g) for s in ((5, 4), (7,), ())]
        m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        for step in range(100):
            grads = [torch.randn(p.shape, generator=g) * 10 ** (step % 3 - 2) for p in params]
            ops.bert_adam(params, grads, m, v, 1e-2 * step / 100, weight_decay=0.1, backend=backend)
        runs[backend] = params
    for got, want in zip(runs["torch"], runs["reference"], strict=True):
        compare.assert_close(got, want, 1e-6)


def test_bert_adam_is_the_stated_formula():
    p, grad, m, v = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 0.5, 0.1, 0.04))
    reference_bert_adam.bert_adam_step(p, grad, m, v, 0.1, (0.9, 0.99), 1e-6, 0.2, 1.0)
    m1, v1 = 0.9 * 0.1 + 0.1 * 0.5, 0.99 * 0.04 + 0.01 * 0.25
    assert p.item() == pytest.approx(2.0 - 0.1 * (m1 / (v1**0.5 + 1e-6) + 0.2 * 2.0), rel=1e-12)


def test_dispatch_refuses_with_a_sentence():
    qkv = torch.randn(1, 4, 3 * 32)
    with pytest.raises(ValueError, match=r"attention has no backend 'tritn'; choose one of auto, triton, sdpa"):
        ops.self_attention(qkv, 2, backend="tritn")
    with pytest.raises(ValueError, match="backend 'sdpa' cannot serve this attention call: it draws dropout from torch's own generator"):
        ops.self_attention(qkv, 2, dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64), backend="sdpa")


def test_dispatch_obeys_the_environment(monkeypatch):
    spec = _dispatch.Spec("attention", "cpu", torch.float32, True)
    attention = _dispatch.OPS["attention"]
    default = attention(spec, "auto")
    assert default is attention.backends["sdpa"].run
    monkeypatch.setenv("FASTIDC_BACKEND", "info_nce=torch, attention=torch")
    assert attention(spec, "auto") is attention.backends["torch"].run
    assert attention(spec, "reference") is attention.backends["reference"].run
    for value, sentence in (
        ("sdpa", "FASTIDC_BACKEND: 'sdpa' is not of the form op=backend"),
        ("atention=sdpa", "FASTIDC_BACKEND: there is no op 'atention'; choose among attention"),
        ("attention=nonsense", "FASTIDC_BACKEND: attention has no backend 'nonsense'; choose one of auto, triton"),
    ):
        monkeypatch.setenv("FASTIDC_BACKEND", value)
        with pytest.raises(FastidcError, match=sentence):
            attention(spec, "auto")
        with pytest.raises(FastidcError, match=sentence):
            ops.check_environment(torch.device("cpu"), torch.float32)
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=xformers")
    with pytest.raises(FastidcError, match="cannot serve this attention call: it runs on CUDA, not on cpu"):
        ops.check_environment(torch.device("cpu"), torch.float32)


def test_explain_lists_every_backend():
    assert set(_dispatch.OPS) == {
        "attention",
        "info_nce",
        "linear_cross_entropy",
        "layer_norm",
        "quick_gelu",
        "bert_adam",
        "patches",
        "squash",
    }
    for op in _dispatch.OPS.values():
        assert set(op.explain(_dispatch.Spec(op.name, "cpu", torch.float32, True))) == set(op.backends)
