"""Linear cross entropy: its kernels in Triton's interpreter on a CPU, for real on a GPU; and its chunks in torch on either."""

import importlib
import math

import compare
import pytest
import torch
from attention_cases import DEVICE, DTYPES, EXACT, INTERPRETED, WHERE, surrounded
from linear_cross_entropy_cases import NAMES, PAD, SHAPES, backend, exact, inputs, with_gradients
from torch import Tensor
from torch.nn import functional as F

from fastidc import ops
from fastidc.ops import _linear_cross_entropy_triton
from fastidc_kernels import linear_cross_entropy as kernels

pytestmark = WHERE
module = importlib.import_module("fastidc.ops.linear_cross_entropy")  # in `fastidc.ops` the function has the name
TOLERANCE = 1e-12 if DEVICE == "cpu" else 3e-5
BOTH = pytest.mark.parametrize("name", ["triton", "torch"])
ours = backend("triton")


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float, name: str = "") -> None:
    for part, a, b in zip(NAMES, got, want, strict=True):
        compare.assert_close(a, b, tolerance, f"{name} {part}")


# ---- value and gradients


@pytest.mark.parametrize("shape", [pytest.param(s, marks=INTERPRETED) if s[1] > 256 else s for s in SHAPES], ids=str)
def test_is_exact(shape):
    """Value and three gradients against the reference in float64, to its last places."""
    given = inputs(*shape, dtype=EXACT)
    assert_same(with_gradients(ours, given), exact(given), TOLERANCE, str(shape))


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 130])
def test_chunks_are_exact(rows_a_chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", rows_a_chunk * 257 * 8)
    given = inputs(130, 40, 257)
    assert_same(with_gradients(backend("torch"), given), exact(given), 1e-12)


@pytest.mark.parametrize("width", [16, 40, pytest.param(640, marks=INTERPRETED), pytest.param(1000, marks=INTERPRETED)])
def test_widths(width):
    given = inputs(5, width, 35, dtype=EXACT)
    assert_same(with_gradients(ours, given), exact(given), TOLERANCE, f"{width}")


def plain(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """As users write it in one dtype: logits in it, cross entropy in fp32."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets, ignore_index=PAD)


@BOTH
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_no_worse_than_torch(dtype, scale, name):
    """Error against float64 at most twice that of torch in the same dtype."""
    given = inputs(70, 64, 300, dtype=dtype, scale=scale)
    want, peer = exact(given), with_gradients(plain, given)
    for part, a, b, c in zip(NAMES, with_gradients(backend(name), given), peer, want, strict=True):
        slack = (1 if c.dim() else 8) * torch.finfo(torch.float32).eps  # torch's one number may be exact by chance
        if not c.dim() and name == "torch":
            slack = max(slack, torch.finfo(dtype).eps / 32)  # and so may ours, of logits rounded as torch rounds them
        compare.assert_close(a, c, 2 * compare.relative_error(b, c) + slack, part)


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])], ids=str)
def test_a_bias_in_fp32_stays_one(dtype):
    """Half precision rows over fp32 masters of the bias: its gradient comes in fp32, and is as good."""
    x, weight, bias, targets = inputs(33, 48, 101, dtype=dtype)
    got = with_gradients(ours, [x, weight, bias.float(), targets])
    assert got[3].dtype == torch.float32
    compare.assert_close(got[3], exact([x, weight, bias, targets])[3], 2e-3)


@INTERPRETED
@BOTH
@pytest.mark.parametrize("shape", [(1, 24, 5), (7, 20, 33)], ids=str)
def test_gradcheck(shape, name):
    *real, targets = inputs(*shape)
    assert torch.autograd.gradcheck(lambda *x: backend(name)(*x, targets), [x.requires_grad_() for x in real], fast_mode=True)


@BOTH
@pytest.mark.parametrize("wanted", [(1, 0, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_partial_gradients(wanted, name):
    """Each may be frozen: the others' gradients stay, and a frozen table costs no product of its own (below)."""
    given = inputs(9, 24, 65, dtype=EXACT)
    full, got = with_gradients(backend(name), given), with_gradients(backend(name), given, wanted)
    for part, a, b in zip(NAMES, got, full, strict=True):
        if a is not None:
            compare.assert_close(a, b, TOLERANCE, part)


# ---- extremes


@BOTH
@pytest.mark.parametrize("rows", [1, 40])
def test_all_pads(rows, name):
    """The loss is 0, as the reference has it, and so is every gradient: a batch of images without captions changes nothing."""
    x, weight, bias, targets = inputs(rows, 24, 33, dtype=EXACT)
    for part, found in zip(NAMES, with_gradients(backend(name), [x, weight, bias, torch.zeros_like(targets)]), strict=True):
        assert not found.any(), part


@BOTH
def test_no_pads_and_other_pad_ids(name):
    x, weight, bias, targets = inputs(40, 24, 33, dtype=EXACT, pads=0.0)
    assert_same(with_gradients(backend(name), [x, weight, bias, targets]), exact([x, weight, bias, targets]), TOLERANCE)
    targets[::3] = -100
    want = with_gradients(backend("reference", -100), [x.double(), weight.double(), bias.double(), targets])
    assert_same(with_gradients(backend(name, -100), [x, weight, bias, targets]), want, TOLERANCE)


@pytest.mark.parametrize("name", ["triton", *(["torch"] if DEVICE == "cpu" else [])])  # on a GPU torch's computes them and multiplies by 0
def test_pads_are_not_looked_at(name):
    """A row without a target may hold anything."""
    given = inputs(40, 24, 33, dtype=torch.float32)
    clean = with_gradients(backend(name), given)
    given[0][given[3] == PAD] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(backend(name), given), clean, strict=True))


@BOTH
def test_identical_rows_and_words(name):
    """All words one: the loss is log V, and nothing pulls on a row."""
    x, weight, _, targets = inputs(33, 24, 65, dtype=torch.float32)
    loss, dx, *_ = with_gradients(backend(name), [x, weight[:1].expand(65, -1), torch.zeros(65, device=DEVICE), targets])
    compare.assert_close(loss, torch.tensor(math.log(65.0)), 1e-6)
    assert float(dx.abs().max()) < 1e-6


@BOTH
@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_sharp_and_lost(scale, name):
    """Targets that win by 100 (a loss near 0) and that lose by it."""
    x, weight, _, targets = inputs(33, 24, 65, dtype=EXACT, pads=0.2)
    bias = 0.1 * torch.arange(65, dtype=EXACT, device=DEVICE)
    x = F.normalize(weight[targets] + 0.05 * x, dim=1)
    given = [scale * x, F.normalize(weight, dim=1), bias, targets]
    for part, a, b in zip(NAMES, with_gradients(backend(name), given), exact(given), strict=True):
        assert float((a.double() - b).norm()) <= (1e-12 if DEVICE == "cpu" else 1e-4) * (1 + float(b.norm())), part


@BOTH
@pytest.mark.parametrize("least", [-1e30, -math.inf])
def test_words_that_are_switched_off(least, name):
    """A bias may rule words out, whole tiles and whole parts of the vocabulary too."""
    x, weight, bias, targets = inputs(33, 24, 300, dtype=EXACT)
    targets = torch.where(targets == PAD, PAD, 280 + targets % 20)
    bias[:280] = least
    given = [x, weight, bias, targets]
    assert_same(with_gradients(backend(name), given), exact(given), TOLERANCE)


# ---- memory that is not ours, determinism, registration


def test_targets_of_any_integer_type():
    given = inputs(9, 24, 33, dtype=torch.float32)
    want = ours(*given)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(ours(*given[:3], given[3].to(dtype)), want), dtype


def test_reads_nothing_else():
    """Inputs between NaN and with strides give the bits that dense ones give."""
    given = inputs(9, 24, 65, dtype=torch.float32)
    dense = with_gradients(ours, given)
    views = [*(surrounded(x)[0] for x in given[:2]), torch.stack([given[2], torch.full_like(given[2], math.nan)], 1)[:, 0]]
    turned = [*(x.T.contiguous().T for x in given[:2]), given[2]]
    targets = torch.stack([given[3], torch.full_like(given[3], 10**6)], 1)[:, 0]
    for x in (views, turned):
        leaves = [v.detach().requires_grad_() for v in x]
        loss = ours(*leaves, targets)
        got = [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]
        assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_writes_every_place(monkeypatch):
    """Scratch and results come as NaN from the allocator, and none is left."""
    given = inputs(9, 260, 33, dtype=torch.float16)
    dense = with_gradients(ours, given)
    allocate, alike = Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(math.nan if x.is_floating_point() else -(2**30))

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape, **more: poisoned(allocate(self, *shape, **more)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **more: poisoned(alike(x, **more)))
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(ours, given), dense, strict=True))


def test_same_bits_twice():
    given = inputs(40, 64, 150, dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(ours, given), with_gradients(ours, given), strict=True))


@BOTH
def test_opcheck(name):
    *real, targets = inputs(5, 24, 33, dtype=torch.float32)
    wanting, close = tuple(x.clone().requires_grad_() for x in real), {"atol": 1e-5, "rtol": 1e-5}
    if name == "torch":
        torch.library.opcheck(module.linear_cross_entropy_chunked, (*wanting, targets, PAD, True, True, True), **close)
        torch.library.opcheck(module.linear_cross_entropy_chunked, (wanting[0], *real[1:], targets, PAD, True, False, False), **close)
        return
    torch.library.opcheck(_linear_cross_entropy_triton.linear_cross_entropy_fwd, (*wanting, targets, PAD, True), **close)
    _, *saved = _linear_cross_entropy_triton.linear_cross_entropy_fwd(*real, targets, PAD, True)
    backward = _linear_cross_entropy_triton.linear_cross_entropy_bwd
    torch.library.opcheck(backward, (torch.ones((), device=DEVICE), *saved, *real[1:], True, False, True), **close)


@BOTH
def test_compiles_without_a_break(name):
    given = inputs(9, 24, 33, dtype=torch.float32)

    def run(x, weight, bias, targets, backend=name):
        return ops.linear_cross_entropy(2 * x, weight.sin(), bias, targets, backend=backend).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = with_gradients(lambda *x: run(*x, backend="reference"), given)
    assert_same(with_gradients(compiled, given), want, 5 * compare.FP32_OP)


@pytest.mark.parametrize(
    ("wanted", "backward"),
    [((1, 0, 1), ["bwd_scale", "bwd_bias"]), ((1, 1, 1), ["bwd_scale", "bwd"]), ((1, 0, 0), ["bwd_scale"]), ((0, 0, 1), ["bwd_bias"])],
)
def test_launches(wanted, backward, monkeypatch):
    """Four forward and at most two backward; none multiplies words whose table is frozen."""
    launched = []
    for part in ("pack", "fwd", "fwd_loss", "fwd_sum", "bwd", "bwd_bias", "bwd_scale"):
        where = kernels.backward if part.startswith("bwd") else kernels.kernels
        monkeypatch.setattr(where, f"linear_cross_entropy_{part}_kernel", _Counted(part, launched))
    *real, targets = inputs(33, 24, 101, dtype=torch.float32)
    leaves = [x.requires_grad_(bool(wants)) for x, wants in zip(real, wanted, strict=True)]
    loss = ours(*leaves, targets)
    assert launched == ["pack", "fwd", "fwd_loss", "fwd_sum"]
    launched.clear()
    torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
    assert launched == backward


class _Counted:
    """A kernel that only says that it was launched."""

    def __init__(self, name: str, launched: list[str]):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **more: self.launched.append(self.name)
