"""The optimiser's kernels: in Triton's interpreter on a CPU, for real on a GPU; and what every backend of the step does alike."""

import math

import compare
import pytest
import torch
from attention_cases import DEVICE, WHERE
from bert_adam_cases import BACKENDS, CONSTANTS, Optimiser, agree, assert_same, gradients, noise
from torch import Tensor

from fastidc import ops
from fastidc_kernels import _bert_adam as device_code
from fastidc_kernels import _tiles
from fastidc_kernels import bert_adam as kernels

pytestmark = WHERE


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a tensor and several blocks a chunk, some whole and some not, of few elements."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_tiles, "bert_adam", lambda arch: _tiles.BertAdamTile(2048, 1024, 2048, 4))


# ---- value


@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_is_the_reference_step_after_step(steps, monkeypatch):
    """Both clips, decay and none, rates that differ and rise from 0, gradients that are 0."""
    if DEVICE == "cpu":  # few programs, which are what the interpreter's time goes to
        monkeypatch.setattr(_tiles, "bert_adam", lambda arch: _tiles.BertAdamTile(8192, 8192, 8192, 4))
    agree(steps, 1.0, 0.3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("clip_norm", "max_norm"), [(1.0, None), (None, 0.5), (None, None), (1e6, 1e6)])
def test_clips(clip_norm, max_norm, backend):
    agree(5, clip_norm, max_norm, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients(dtype):
    agree(4, 1.0, None, dtype=dtype)


def test_one_group_as_a_function():
    ours, theirs = Optimiser(), Optimiser("reference")
    for step in range(3):
        for optimiser in (ours, theirs):
            state = (optimiser.params, gradients(step), optimiser.first, optimiser.second)
            ops.bert_adam(*state, 1e-2, weight_decay=0.1, backend=optimiser.backend)
    assert_same(ours.state, theirs.state)


def test_what_a_gpu_s_tile_cuts(monkeypatch):
    """The tile of the table, with a tensor of whole chunks and a rest."""
    tile = kernels._tiles.BertAdamTile(8192, 1024, 2048, 4)
    monkeypatch.setattr(_tiles, "bert_adam", lambda arch: tile)
    sizes = ((3 * 8192 + 5,), (8192,), (13,))
    ours, theirs = Optimiser(sizes=sizes), Optimiser("reference", sizes)
    for step in range(2):
        ours(gradients(step, sizes=sizes), clip_norm=1.0)
        theirs(gradients(step, sizes=sizes), clip_norm=1.0)
    assert_same(ours.state, theirs.state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shadows_are_the_rounded_masters(backend, dtype):
    optimiser = Optimiser(backend, shadow=dtype)
    for step in range(2):
        optimiser(gradients(step))
    for shadow, p in zip(optimiser.shadows, optimiser.params, strict=True):
        if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts bits off where a GPU rounds
            assert ((shadow.float() - p).abs() <= 2**-7 * p.abs()).all()
        else:
            assert torch.equal(shadow, p.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ceiling(backend):
    """On a tensor that trains, and on one that does not."""
    for trains in (True, False):
        optimiser = Optimiser(backend)
        own = optimiser.params[2] if trains else torch.full((3,), 9.0, device=DEVICE)
        optimiser(gradients(1), ceiling=(own, 0.25))
        assert float(own.max()) == 0.25
        assert float(optimiser.params[3].max()) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_is_known(backend):
    """Nothing is clipped to it, single tensors still are, and it alone decides whether there is an update."""
    ours, theirs = Optimiser(backend, max_norm=0.3), Optimiser("reference", max_norm=0.3)
    given = torch.tensor(77.0, device=DEVICE)
    assert float(ours(gradients(1), norm=given, clip_norm=1.0)) == 77.0
    theirs(gradients(1))
    assert_same(ours.state, theirs.state)
    before = [x.clone() for x in ours.state]
    ours(gradients(2), norm=torch.tensor(math.nan, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(ours.state, before, strict=True))
    assert ours.step.skipped == 1


# ---- gradients that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_out_what_is_not_finite(backend, bad):
    """Neither weights nor moments nor shadows change, it is counted, and the next step is as if nothing had been. 3e38 is finite, and its square
    is not."""
    optimiser, untroubled = Optimiser(backend, shadow=torch.float16), Optimiser(backend, shadow=torch.float16)
    for o in (optimiser, untroubled):
        o(gradients(0), clip_norm=1.0)
    before = [x.clone() for x in (*optimiser.state, *optimiser.shadows)]
    spoilt = gradients(1)
    spoilt[3][4096] = bad
    if bad == 3e38:
        spoilt[3][4095] = spoilt[3][1] = bad
    norm = optimiser(spoilt, clip_norm=1.0)
    assert not math.isfinite(float(norm))
    assert all(torch.equal(a, b) for a, b in zip((*optimiser.state, *optimiser.shadows), before, strict=True))
    assert optimiser.step.skipped == 1
    for o in (optimiser, untroubled):
        assert math.isfinite(float(o(gradients(2), clip_norm=1.0)))
    assert all(torch.equal(a, b) for a, b in zip(optimiser.state, untroubled.state, strict=True))
    assert (optimiser.step.skipped, untroubled.step.skipped) == (1, 0)


def test_weights_that_are_not_finite_are_not_mended():
    optimiser = Optimiser()
    optimiser.params[3][7] = math.nan
    optimiser(gradients(1), ceiling=(optimiser.params[3], 0.5))
    assert optimiser.params[3][7].isnan()


# ---- memory


def test_touches_nothing_else():
    """Every tensor between NaN, at addresses that are no multiples of 16, shadows too."""
    plain, ours = Optimiser(shadow=torch.float16), Optimiser(shadow=torch.float16)
    margins = []

    def amid(x: Tensor, i: int) -> Tensor:
        buffer = torch.full((x.numel() + 64,), math.nan, device=DEVICE, dtype=x.dtype)
        at = slice(17 + i % 4, 17 + i % 4 + x.numel())
        buffer[at] = x.flatten()
        margins.append((buffer, at))
        return buffer[at].view(x.shape)

    for part in (ours.params, ours.first, ours.second, ours.shadows):
        part[:] = [amid(x, i) for i, x in enumerate(part)]
    for step in range(2):
        plain(gradients(step), clip_norm=1.0)
        ours([amid(g, i + step) for i, g in enumerate(gradients(step))], clip_norm=1.0)
    assert_same([*ours.state, *ours.shadows], [*plain.state, *plain.shadows], 1e-6 if DEVICE == "cpu" else 1e-3)
    assert_same(ours.state, plain.state)
    for buffer, at in margins:
        assert not buffer[at].isnan().any()
        buffer[at] = math.nan
        assert buffer.isnan().all(), "written outside"


def test_same_bits_twice():
    runs = [Optimiser(max_norm=0.3) for _ in range(2)]
    for step in range(3):
        norms = [run(gradients(step), clip_norm=1.0) for run in runs]
        assert torch.equal(*norms)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].state, runs[1].state, strict=True))


def test_gradients_may_move_and_parameters_too(monkeypatch):
    """New gradients cost a copy of their addresses; only other parameters or moments make new tables."""
    made = []
    make = kernels.bert_adam_table
    monkeypatch.setattr(kernels, "bert_adam_table", lambda *a: made.append(None) or make(*a))
    ours, theirs = Optimiser(), Optimiser("reference")
    kept = []
    for step in range(4):
        kept.append(gradients(step))  # so that none comes back to its address
        ours(kept[-1], clip_norm=1.0)
        theirs(gradients(step), clip_norm=1.0)
    assert len(made) == 1
    ours.first = [m.clone() for m in ours.first]
    ours(gradients(4), clip_norm=1.0)
    theirs(gradients(4), clip_norm=1.0)
    assert len(made) == 2
    assert_same(ours.state, theirs.state)
    turned = [g.t().contiguous().t() if g.dim() == 2 else g for g in gradients(5)]
    ours(turned)
    theirs(gradients(5))
    assert_same(ours.state, theirs.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_are_read_from_the_device(backend):
    ours, theirs = Optimiser(backend), Optimiser("reference")
    rates = torch.zeros(2, device=DEVICE)
    for step in range(3):
        lrs = [1e-2 * step, 3e-3 * step]
        rates.copy_(torch.tensor(lrs))
        ours(gradients(step), rates)
        theirs(gradients(step), lrs)
    assert_same(ours.state, theirs.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_tensors_without_anything_in_them(backend):
    ours, theirs = Optimiser(backend, ((0,), (5,), (0, 3))), Optimiser("reference", ((5,),))
    nothing = ops.BertAdamGroup([], [], [], [])
    grad = gradients(1, sizes=((5,),))
    norm = ours.step([nothing, *ours.groups([noise((0,), 0), grad[0].clone(), noise((0, 3), 0)])], [1.0, 0.5, 1e-2], backend=backend)
    assert float(norm) == pytest.approx(float(grad[0].norm()), rel=1e-6)
    group = ops.BertAdamGroup(theirs.params, grad, theirs.first, theirs.second, **CONSTANTS[1])
    p = noise((5,), 1)
    theirs.params[0].copy_(p)
    theirs.step([group], [1e-2], backend="reference")
    compare.assert_close(ours.params[1], theirs.params[0], 1e-6)
    assert float(ours.step([nothing], [1.0], backend=backend)) == 0


def test_four_launches(monkeypatch):
    """However many tensors and groups."""
    launched = []

    class Counted:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **more: launched.append(self.name)

    for part in ("norms", "sums", "scales", "update"):
        monkeypatch.setattr(device_code, f"bert_adam_{part}_kernel", Counted(part))
    optimiser = Optimiser(shadow=torch.float16)
    optimiser(gradients(0), clip_norm=1.0, ceiling=(optimiser.params[0], 1.0))
    assert launched == ["norms", "sums", "scales", "update"]
    launched.clear()
    optimiser(gradients(0), norm=torch.ones((), device=DEVICE))
    assert launched == ["scales", "update"]
