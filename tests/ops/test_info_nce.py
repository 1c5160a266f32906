"""The InfoNCE kernels: in Triton's interpreter on a CPU, for real on a GPU."""

import math

import compare
import pytest
import torch
from attention_cases import DEVICE, DTYPES, EXACT, INTERPRETED, WHERE, surrounded
from info_nce_cases import LARGEST, NAMES, SHAPES, backend, exact, inputs, with_gradients
from torch import Tensor
from torch.nn import functional as F

from fastidc import ops
from fastidc.ops import _info_nce_triton
from fastidc_kernels import info_nce as kernels

pytestmark = WHERE
TOLERANCE = 1e-12 if DEVICE == "cpu" else 3e-5
ours = backend("triton")


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float, name: str = "") -> None:
    for part, a, b in zip(NAMES, got, want, strict=True):
        compare.assert_close(a, b, tolerance, f"{name} {part}")


# ---- value and gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_exact(shape):
    """Value and three gradients against the reference in float64, to its last places."""
    given = inputs(*shape, dtype=EXACT)
    got, want = with_gradients(ours, given), exact(given)
    assert_same(got, want, TOLERANCE, str(shape))


@pytest.mark.parametrize("scale", [0.0, 2.0, LARGEST])
@pytest.mark.parametrize("width", [16, 40, 48, 100])
def test_widths_and_scales(width, scale):
    given = inputs(9, width, scale, dtype=EXACT)
    assert_same(with_gradients(ours, given), exact(given), TOLERANCE, f"{width}")


@INTERPRETED
@pytest.mark.parametrize("width", [640, 768, 1024])
def test_wide_vectors(width):
    given = inputs(5, width)
    assert_same(with_gradients(ours, given), exact(given), TOLERANCE, f"{width}")


def plain(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """As users write it in one dtype: vectors and scores in it, cross entropy in fp32."""
    scores = logit_scale.exp().to(text.dtype) * F.normalize(text, dim=-1) @ F.normalize(pair, dim=-1).T
    target = torch.arange(len(text), device=text.device)
    return (F.cross_entropy(scores.float(), target) + F.cross_entropy(scores.float().T, target)) / 2


@pytest.mark.parametrize("cone", [0.0, 1.5])
@pytest.mark.parametrize("scale", [0.0, LARGEST])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_no_worse_than_torch(dtype, scale, cone):
    """Error against float64 at most twice that of torch in the same dtype; ``cone``: vectors that share a direction, as CLIP's do."""
    given = inputs(130, 64, scale, dtype=dtype, cone=cone)
    want = exact(given)
    peer = with_gradients(plain if dtype.itemsize == 2 else backend("torch"), given)
    for part, a, b, c in zip(NAMES, with_gradients(ours, given), peer, want, strict=True):
        slack = (1 if c.dim() else 8) * torch.finfo(torch.float32).eps  # torch's one number may be exact by chance
        compare.assert_close(a, c, 2 * compare.relative_error(b, c) + slack, part)


@INTERPRETED
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (5, 40)], ids=str)
def test_gradcheck(shape):
    given = [x.requires_grad_() for x in inputs(*shape, 1.0)]
    assert torch.autograd.gradcheck(ours, given, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_partial_gradients(wanted):
    given = inputs(7, 24, dtype=EXACT)
    full = with_gradients(ours, given)[1:]
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(given)]
    (got,) = torch.autograd.grad(3 * ours(*alone), alone[wanted])
    assert torch.equal(got, full[wanted])


# ---- extremes


def test_identical_rows():
    """All texts one vector, all pairs another: the loss is log B, and nothing pulls anywhere."""
    text, pair, scale = inputs(33, 24, dtype=torch.float32)
    loss, dtext, dpair, dscale = with_gradients(ours, [text[:1].expand(33, -1), pair[:1].expand(33, -1), scale])
    compare.assert_close(loss, torch.tensor(math.log(33.0)), 1e-6)
    assert max(float(x.abs().max()) for x in (dtext, dpair, dscale)) < 1e-5


def test_duplicates():
    """A caption that stands twice in the batch."""
    text, pair, scale = inputs(17, 24, dtype=EXACT)
    text[5], pair[11] = text[3], pair[3]
    assert_same(with_gradients(ours, [text, pair, scale]), exact([text, pair, scale]), TOLERANCE)


def test_sharp_and_lost():
    """Pairs that are their texts (loss near 0), and their negatives (near 200): no maximum is a bound, none is clamped."""
    for sign in (1.0, -1.0):
        text, _, scale = inputs(33, 64, dtype=EXACT)
        noise = torch.linspace(0, 0.5, text.numel(), dtype=text.dtype, device=DEVICE).view_as(text)
        given = [text, sign * text + noise, scale]
        got, want = with_gradients(ours, given), exact(given)
        for part, a, b in zip(NAMES, got, want, strict=True):
            assert float((a.double() - b).norm()) <= (1e-12 if DEVICE == "cpu" else 1e-4) * (1 + float(b.norm())), part


def test_short_vectors():
    """Norms below F.normalize's 1e-12, a vector of zeros, and very long ones."""
    text, pair, scale = inputs(7, 24, 1.0, dtype=EXACT)
    text[1] *= 1e-14
    text[2] = 0
    pair[3] *= 1e12
    got, want = with_gradients(ours, [text, pair, scale]), exact([text, pair, scale])
    compare.assert_close(got[0], want[0], TOLERANCE)
    for a, b in zip(got[1:3], want[1:3], strict=True):
        for i in range(7):
            compare.assert_close(a[i], b[i], 100 * TOLERANCE, f"row {i}")


# ---- memory that is not ours, determinism, registration


def test_reads_nothing_else():
    """Inputs between NaN and with strides give the bits that dense ones give."""
    given = inputs(33, 40, dtype=torch.float32)
    dense = with_gradients(ours, given)
    views = [surrounded(x)[0] for x in given[:2]]
    turned = given[1].T.contiguous().T
    for text, pair in (views, (given[0], turned)):
        text, pair = (x.detach().requires_grad_() for x in (text, pair))
        scale = given[2].clone().requires_grad_()
        loss = ours(text, pair, scale)
        got = [loss.detach(), *torch.autograd.grad(3 * loss, [text, pair, scale])]
        assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_writes_every_place(monkeypatch):
    """Scratch and results come as NaN from the allocator, and none is left."""
    given = inputs(33, 40, dtype=torch.float32)
    dense = with_gradients(ours, given)
    allocate, alike = Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape, **more: poisoned(allocate(self, *shape, **more)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **more: poisoned(alike(x, **more)))
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(ours, given), dense, strict=True))


def test_same_bits_twice():
    given = inputs(130, 64, dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(ours, given), with_gradients(ours, given), strict=True))


def test_opcheck():
    given = inputs(5, 24, 1.0, dtype=torch.float32)
    wanting = tuple(x.clone().requires_grad_() for x in given)
    torch.library.opcheck(_info_nce_triton.info_nce_fwd, wanting, atol=1e-5, rtol=1e-5)
    _, *saved = _info_nce_triton.info_nce_fwd(*given)
    torch.library.opcheck(_info_nce_triton.info_nce_bwd, (torch.ones((), device=DEVICE), *saved, given[2], 24), atol=1e-5, rtol=1e-5)


def test_compiles_without_a_break():
    given = inputs(9, 24, 1.0, dtype=torch.float32)
    compiled = torch.compile(lambda *x: ours(2 * x[0], x[1].sin(), x[2]).square(), fullgraph=True, backend="aot_eager")
    want = with_gradients(lambda *x: ops.info_nce(2 * x[0], x[1].sin(), x[2], backend="torch").square(), given)
    assert_same(with_gradients(compiled, given), want, 5 * compare.FP32_OP)


@pytest.mark.parametrize("rows", [16, 130, 512])
def test_few_launches(rows, monkeypatch):
    """Three forward and at most three backward up to 512 rows."""
    launched = []
    for name in ("unit", "fwd", "fwd_loss", "bwd", "sum"):
        module = kernels.backward if name == "bwd" else kernels.kernels
        monkeypatch.setattr(module, f"info_nce_{name}_kernel", _Counted(name, launched))
    given = [x.requires_grad_() for x in inputs(rows, 24, dtype=torch.float32)]
    loss = ours(*given)
    assert launched == ["unit", "fwd", "fwd_loss"]
    launched.clear()
    torch.autograd.grad(loss, given)
    assert launched == ["bwd", "sum"]


class _Counted:
    """A kernel that only says that it was launched."""

    def __init__(self, name: str, launched: list[str]):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **more: self.launched.append(self.name)
