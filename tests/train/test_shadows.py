"""Weights kept in half precision: bit for bit what autocast computes without them, never out of date, and with the casts gone."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from shadow_cases import BF16, CONFIG, Run, batch_of, recipe_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from bench import count
from bench.peers import ours
from fastidc import ops
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.train.distributed import ALONE, World
from fastidc.train.precision import Precision
from fastidc.train.shadows import Shadows, multiplied, shadows_for

# What is read in fp32 at one place and cast at another, or small and read in more ways than one.
STILL_CAST = {
    "pair_encoder.patch_embed.class_token",
    "text_encoder.projection",
    *(f"{tower}.mlp.fc1.bias" for tower in ("pair_encoder.blocks.0", "pair_encoder.blocks.1", "text_encoder.blocks.0")),
}


def assert_alike(a: Run, b: Run, steps: int = 2) -> None:
    """Bit for bit: losses, norms, every gradient and, after ``steps``, every parameter."""
    start = {name: p.detach().clone() for name, p in a.model.named_parameters()}
    for number in range(steps):
        for x, y in zip(a.step(number), b.step(number), strict=True):
            assert torch.equal(x, y), number
            assert x.isfinite()
        got, want = a.gradients[-1], b.gradients[-1]
        assert got.keys() == want.keys()
        for name in want:
            assert torch.equal(got[name].to(want[name].dtype), want[name]), f"gradient of {name} at step {number}"
    own, theirs = dict(a.model.named_parameters()), dict(b.model.named_parameters())
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert sum(not torch.equal(own[name], start[name]) for name in a.gradients[-1]) > 20, "it trains"


CHANGES = [
    {},
    {"dropout": 0.3},
    {"accumulate": 2},
    {"freeze_layers": -1},
    {"freeze_layers": 1},
    {"optimizer": "adamw"},
    {"optimizer": "muon"},
    {"half_gradients": True},
    {"half_gradients": True, "accumulate": 2},
]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        *(("adapt", changes) for changes in [*CHANGES, {"micro_batch": 2}, {"micro_batch": 2, "half_gradients": True}]),
        *(("finetune", changes) for changes in [*CHANGES, {"freeze_tokens": False}, {"freeze_tokens": False, "half_gradients": True}]),
    ],
    ids=str,
)
def test_nothing_changes_but_the_casts(stage, changes):
    """``freeze_tokens``: on Spot-the-Diff the word table trains, as an embedding in fp32 and as the classifier in bf16."""
    without = {name: value for name, value in changes.items() if name != "half_gradients"}
    assert_alike(Run(stage, True, **changes), Run(stage, False, **without))


def test_fp16_with_its_scaler():
    assert_alike(Run("adapt", True, Precision("fp16", "cpu")), Run("adapt", False, Precision("fp16", "cpu")))


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_inside_a_compiled_captioner(compiler):
    """The compiler's numbers with shadows and without; one graph each, though new stand-ins come at every step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    runs = [Run("finetune", shadows, compiler=compiler, freeze_tokens=False) for shadows in (True, False)]
    assert_alike(*runs)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


# ---- which


class Casts(TorchDispatchMode):
    """Names of the parameters that something casts to bf16, how often."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16 and args[0].data_ptr() in self.names:
            self.seen.append(self.names[args[0].data_ptr()])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_what_is_shadowed_is_what_autocast_casts(stage):
    casts = {}
    for shadows in (False, True):
        run = Run(stage, shadows, freeze_tokens=False)
        with Casts(run.model) as watched, BF16.autocast():
            run.model(run.trainer.ready([batch_of(stage)])[0][0], run.trainer.objectives)
        casts[shadows] = watched.seen
    names = set(multiplied(run.model, stage))
    kept = STILL_CAST if stage == "adapt" else {name for name in STILL_CAST if not name.startswith("text_encoder.")}
    assert set(casts[False]) - names == kept
    assert names <= set(casts[False])
    assert len(casts[False]) >= len(names) + len(kept)
    assert sorted(casts[True]) == sorted(kept)
    assert not [name for name in names if re.search(r"norm|logit_scale|position|embedding\b(?<!token_embedding)", name)]


def test_a_module_has_its_parameters_back():
    run = Run("adapt", True)
    before = dict(run.model.named_parameters())
    with pytest.raises(AttributeError), BF16.autocast():
        run.model(batch_of("adapt"), [None])
    broken = dataclasses.replace(batch_of("adapt"), text=torch.ones(4, 99, dtype=torch.long))
    with pytest.raises(FastidcError, match="exceed the model's"), BF16.autocast():
        run.model(broken, run.trainer.objectives)
    assert all(p is before[name] for name, p in run.model.named_parameters())
    assert copy.deepcopy(run.model).shadows is None


def test_other_readers_get_the_masters(monkeypatch):
    """Without autocast, and where a caption is generated."""
    run = Run("finetune", True)
    monkeypatch.setattr(run.model.shadows, "_stand_ins", lambda group: pytest.fail("stood in"))
    run.model(batch_of("finetune"), run.trainer.objectives)
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    with BF16.autocast():
        run.model.generate(images, images, max_length=3)
        run.model.caption_loss(images, images, torch.ones(2, 3).long(), torch.ones(2, 3).long())


# ---- never out of date


def shadowed(run: Run) -> list[tuple[str, Tensor, Tensor]]:
    own = dict(run.model.named_parameters())
    return [(name, own[name], run.model.shadows.of(own[name])) for name in run.model.shadows.names]


def load(run: Run) -> None:
    run.model.load_weights({name: p.detach() + 1 for name, p in run.model.named_parameters()}, "test")


def new_data(run: Run) -> None:
    p = run.model.pair_encoder.projection
    p.data = p.data + 1


def new_parameter(run: Run) -> None:
    linear = run.model.pair_encoder.blocks[1].mlp.fc2
    linear.weight = torch.nn.Parameter(linear.weight.detach() + 1)


@pytest.mark.parametrize("change", [load, new_data, new_parameter])
def test_weights_that_somebody_writes_are_copied_anew(change):
    run = Run("adapt", True)
    run.step(0)
    change(run)
    assert any(not torch.equal(shadow, p.bfloat16()) for _, p, shadow in shadowed(run) if shadow is not None) != (change is new_parameter)
    with torch.no_grad(), BF16.autocast():
        run.model(batch_of("adapt"), run.trainer.objectives)
    for name, p, shadow in shadowed(run):
        assert torch.equal(shadow, p.bfloat16()), name


@pytest.mark.parametrize(("backend", "bad"), [("torch", False), ("triton", False), ("torch", True), ("triton", True)])
def test_the_optimiser_writes_them(monkeypatch, backend, bad):
    """Nothing is left to copy, whoever serves, also where an update is left out. In fp16: interpreted kernels cut bf16 off instead of rounding."""
    monkeypatch.setenv("FASTIDC_BACKEND", f"bert_adam={backend}")
    run = Run("adapt", True, Precision("fp16", "cpu"), freeze_layers=2)
    if bad:
        p = run.model.pair_encoder.projection
        p.register_hook(lambda g: g * math.nan)
    norm = run.step(0)[1]
    assert bool(norm.isfinite()) != bad
    assert all(torch.equal(shadow, p.half()) for _, p, shadow in shadowed(run))
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a: pytest.fail("copied"))
    run.model.shadows.refresh()


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_who_does_not_know_of_them_is_found_out(backend):
    """The kernels and torch's fused optimisers write past torch's eyes, and the step says so for them."""
    run = Run("adapt", True)
    p = run.model.pair_encoder.projection
    ops.BertAdamStep()([ops.BertAdamGroup(*([x] for x in (p, torch.ones_like(p), *torch.zeros(2, *p.shape))))], [0.1], backend=backend)
    assert not torch.equal(run.model.shadows.of(p), p.bfloat16())
    run.model.shadows.refresh()
    assert torch.equal(run.model.shadows.of(p), p.bfloat16())


# ---- gradients in half precision


def test_gradients_are_bf16_where_their_weights_are():
    run = Run("finetune", True, half_gradients=True, freeze_tokens=False)
    run.step(0)
    names = set(run.model.shadows.names) - {"text_encoder.token_embedding"}
    found = {name for name, g in run.gradients[0].items() if g.dtype == torch.bfloat16}
    assert found == names & run.gradients[0].keys()
    assert len(found) > 20
    assert run.gradients[0]["text_encoder.token_embedding"].dtype == torch.float32


def test_the_kernels_read_both():
    """fp32 and bf16 gradients in one step, some parameters with shadows: what the rounded gradients give in fp32."""
    g = torch.Generator().manual_seed(0)
    shapes = ((1,), (1030,), (33, 29), (7,), (64,))

    def step(backend: str, half: bool):
        g.manual_seed(0)
        params, first, second = ([torch.randn(s, generator=g).abs() for s in shapes] for _ in range(3))
        shadows = [torch.zeros_like(p, dtype=torch.float16) if i % 2 else None for i, p in enumerate(params)]
        ours, norms = ops.BertAdamStep(), []
        for number in range(3):
            grads = [torch.randn(s, generator=g).bfloat16() for s in shapes]
            grads = [x if half and (i % 2 or number == 2) else x.float() for i, x in enumerate(grads)]
            parts = (params, grads, first, second)
            rows = (slice(0, 3), slice(3, None))
            groups = [ops.BertAdamGroup(*(p[r] for p in parts), max_norm=2.0, shadows=shadows[r]) for r in rows]
            norms.append(ours(groups, [1e-2, 1e-3], clip_norm=10.0, ceiling=(params[0], 0.5), backend=backend))
        return [torch.stack(norms), *params, *first, *second], [s for s in shadows if s is not None]

    want, _ = step("reference", False)
    for backend, half in (("triton", True), ("triton", False), ("torch", True), ("reference", True)):
        got, shadows = step(backend, half)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert torch.allclose(a, b, rtol=2e-6, atol=1e-7), (backend, half, i)
        assert all(torch.equal(s, p.half()) for s, p in zip(shadows, got[1 : len(shapes) + 1][1::2], strict=True))
    assert float(want[1]) <= 0.5


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_casts_that_are_left(monkeypatch, stage):
    """As a GPU has them, our kernels at work: tables and embeddings, whatever the number of layers, and the gradients of two of them."""
    with count.kernels(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        stepper = ours.build(CONFIG, None, stage, "cpu")
        stepper.model.shadows.half_gradients = True
        batch = count.without_data(lambda: stepper.prepare(count.random_batch(CONFIG, stage, 4, "cpu", words=8)))
        stepper.model.pair_encoder.patch_embed.folded(torch.bfloat16)  # of a frozen stem, once
        found = count.operators(lambda: stepper.forward_backward(batch))
    casts = [found[phase]["aten::_to_copy"] for phase in ("forward", "backward")]
    # lower these, never raise
    assert all(now <= then for now, then in zip(casts, {"adapt": (6, 2), "finetune": (5, 1)}[stage], strict=True)), casts


def test_who_is_served():
    model = CLIP4IDC(CONFIG)
    for stage in ("adapt", "finetune"):
        shadows, why = shadows_for(model, stage, recipe_of(stage), BF16, ALONE)
        assert len(shadows) == len(multiplied(model, stage))
        assert not shadows.half_gradients
        assert "no weight is cast in a step; gradients in fp32, since on a CPU" in why
    for name in ("fp32", "fp16-official"):
        assert shadows_for(model, "adapt", recipe_of("adapt"), Precision(name, "cpu"), ALONE) == (None, f"{name} casts no weights")
    assert "gathers weights" in shadows_for(model, "adapt", recipe_of("adapt"), BF16, ALONE, fsdp=True)[1]
    for changes, sentence in (
        ({"accumulate": 2}, "several backward passes"),
        ({"micro_batch": 2}, "several backward passes"),
        ({"optimizer": "muon"}, "muon reads no others"),
    ):
        assert sentence in shadows_for(model, "adapt", recipe_of("adapt", **changes), BF16, ALONE)[1]
    assert "processes average" in shadows_for(model, "adapt", recipe_of("adapt"), BF16, World(size=2))[1]
    assert "unscaled in fp32" in shadows_for(model, "adapt", recipe_of("adapt"), Precision("fp16", "cpu"), ALONE)[1]
    with pytest.raises(FastidcError, match=r"shadows are kept of fp32 parameters, and pair_encoder.projection is torch.float16"):
        Shadows(model.half(), "adapt", torch.bfloat16)
