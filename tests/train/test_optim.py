"""Groups, freezing, schedules and optimisers, with the official name rules written out a second time."""

import dataclasses
import json
import math

import compare
import pytest
import torch
import worlds

from fastidc.checkpoint import our_name
from fastidc.config import PRESETS
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.reference import bert_adam
from fastidc.train.optim import MAX_LOGIT_SCALE, Optimizer, parameter_groups, schedule
from fastidc.train.steplog import StepLog

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)
OFFICIAL = list(worlds.official_state(CONFIG, "caption"))
NEW = ("joint_positional_embedding", "bef_embedding", "aft_embedding", "ln_mid.weight", "ln_mid.bias")
STEM = ("clip.positional_embedding", "clip.token_embedding.weight", "clip.visual.class_embedding", "clip.visual.positional_embedding")
STEM_PREFIXES = ("clip.visual.conv1.", "clip.visual.ln_pre.")


def official_group(name, stage):
    """(rate factor is coef_lr, decays) by the official rules on official names (clip4idc.md 5.1)."""
    decays = "bias" not in name and "LayerNorm.weight" not in name
    new = name.endswith(NEW) if stage == "adapt" else not name.startswith("clip.")
    return (not new, decays)


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_groups_are_the_official_ones(stage):
    recipe = getattr(PRESETS["clevr"], stage)
    model = CLIP4IDC(CONFIG)
    found = {name: group for group in parameter_groups(model, stage, recipe) for name in group["names"]}
    seen = set()
    for official in OFFICIAL:
        ours, _ = our_name(official)
        text_only = official.startswith(("clip.transformer.", "clip.ln_final", "clip.text_projection", "clip.logit_scale"))
        unused = official.startswith("decoder.") if stage == "adapt" else text_only
        if official in STEM or official.startswith(STEM_PREFIXES) or unused:
            assert ours not in found, f"{official} is frozen or unused"
            continue
        slow, decays = official_group(official, stage)
        group = found[ours]
        assert group["lr"] == pytest.approx(recipe.lr * (recipe.coef_lr if slow else 1)), official
        assert group["weight_decay"] == (recipe.weight_decay if decays else 0.0), official
        seen.add(ours)
    assert seen == set(found)


def test_deeper_and_no_freezing():
    model = CLIP4IDC(CONFIG)
    trained = {
        n for g in parameter_groups(model, "adapt", dataclasses.replace(PRESETS["clevr"].adapt, freeze_layers=2)) for n in g["names"]
    }
    assert not any(".blocks.0." in n or ".blocks.1." in n for n in trained)
    assert any("pair_encoder.blocks.2." in n for n in trained)
    everything = parameter_groups(model, "adapt", dataclasses.replace(PRESETS["clevr"].adapt, freeze_layers=-1))
    assert {n for g in everything for n in g["names"]} == {n for n, _ in model.named_parameters() if not n.startswith("captioner.")}
    spot = parameter_groups(model, "finetune", dataclasses.replace(PRESETS["clevr"].finetune, freeze_tokens=False))
    assert any("text_encoder.token_embedding" in g["names"] for g in spot)


@pytest.mark.parametrize("name", ["warmup_cosine", "warmup_linear"])
def test_official_schedules(name):
    recipe = dataclasses.replace(PRESETS["clevr"].adapt, schedule=name)
    ours = schedule(recipe, 200)
    assert ours(0) == 0, "the first step has rate 0"
    for step in range(200):
        assert ours(step) == pytest.approx(getattr(bert_adam, name)(step / 200, 0.1), abs=1e-12)
    if name == "warmup_cosine":
        assert ours(19) == pytest.approx(0.95)
        assert ours(20) == pytest.approx(0.5 * (1 + math.cos(0.1 * math.pi))), "the cosine drops where warm-up ends"


def test_temperature_is_clamped_after_a_step():
    model = CLIP4IDC(CONFIG)
    optimizer = Optimizer(model, "adapt", dataclasses.replace(PRESETS["clevr"].adapt, lr=1.0, coef_lr=1.0, weight_decay=0.0), 10)
    optimizer.steps = 5
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOGIT_SCALE - 1e-3)
    (-10 * model.logit_scale).backward()
    optimizer.step()
    assert model.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("name", ["bert_adam", "adamw", "muon"])
def test_every_optimizer_lowers_a_loss_and_obeys_the_schedule(name):
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG)
    recipe = dataclasses.replace(PRESETS["tiny"].adapt, optimizer=name, lr=3e-3)
    optimizer = Optimizer(model, "adapt", recipe, 30)
    before, after = torch.randn(2, 6, 3, 48, 48)
    ids = torch.randint(1, 100, (6, 8))
    ids[:, -1] = CONFIG.end_id
    losses = []
    for step in range(30):
        assert set(optimizer.lrs) == {recipe.lr * schedule(recipe, 30)(step)}
        loss = model.adaptation_loss(before, after, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_muon_takes_the_matrices_of_the_blocks_alone():
    model = CLIP4IDC(CONFIG)
    optimizer = Optimizer(model, "finetune", PRESETS["tiny"].finetune, 10)
    muon = {id(p) for inner in optimizer.inner if isinstance(inner, torch.optim.Muon) for g in inner.param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in muon}
    assert "captioner.decoder.0.cross.kv.weight" in names
    assert "pair_encoder.blocks.2.mlp.fc1.weight" in names
    assert not names & {"text_encoder.token_embedding", "pair_encoder.projection", "pair_encoder.joint_position", "captioner.head.weight"}
    everything = [p for inner in optimizer.inner for g in inner.param_groups for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(optimizer.parameters)


def stepped(optimizer: Optimizer, spoil: float | None = None, seed: int = 0) -> float:
    """One step on drawn gradients, one number of which is ``spoil``; the norm."""
    g = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters:
        p.grad = torch.randn(p.shape, generator=g).to(p.device)
    if spoil is not None:
        optimizer.parameters[-1].grad.view(-1)[-1] = spoil
    return float(optimizer.step())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["bert_adam", "adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad):
    """Neither weights nor moments; the schedule goes on, and so does training."""
    recipe = dataclasses.replace(PRESETS["clevr"].adapt, optimizer=name, warmup=0.0)
    optimizer = Optimizer(CLIP4IDC(CONFIG), "adapt", recipe, 100)
    stepped(optimizer)
    before = [p.detach().clone() for p in optimizer.parameters]
    moments = [x.clone() for inner in optimizer.inner for state in inner.state.values() for x in state.values()]
    assert not math.isfinite(stepped(optimizer, bad))
    assert optimizer.steps == 2
    assert all(p.grad is None for p in optimizer.parameters)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.parameters, before, strict=True))
    after = [x for inner in optimizer.inner for state in inner.state.values() for x in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert math.isfinite(stepped(optimizer))
    assert not all(torch.equal(a, b) for a, b in zip(optimizer.parameters, before, strict=True))
    assert name != "bert_adam" or optimizer.inner[0].skipped == 1


def test_the_log_counts_what_was_left_out(tmp_path):
    """In fp32 and bf16 a run ends when it next looks, with weights that are as they were."""
    log = StepLog(tmp_path / "log.jsonl")
    for step, norm in enumerate((1.0, math.nan, 2.0, math.inf), start=1):
        log.add({"step": step, "lr": [1.0]}, torch.tensor(1.0), torch.tensor(norm))
    with pytest.raises(FastidcError, match="not finite at step 2"):
        log.flush()
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2]
    assert [row["grad_norm"] for row in rows] == [1.0, None, 2.0, None]


@pytest.mark.slow
def test_the_kernels_train_as_torch_does(monkeypatch):
    """Whole optimiser steps with the global clip, four groups, the schedule and the clamp, by the kernels and by torch."""
    pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = dataclasses.replace(PRESETS["clevr"].adapt, warmup=0.1, lr=1e-2, coef_lr=0.1)
    runs = {}
    for backend in ("triton", "torch"):
        monkeypatch.setenv("FASTIDC_BACKEND", f"bert_adam={backend}")
        torch.manual_seed(0)
        model = CLIP4IDC(worlds.SMALL).to(device)
        with torch.no_grad():
            model.logit_scale.fill_(MAX_LOGIT_SCALE + 1)
        optimizer = Optimizer(model, "adapt", recipe, 20)
        assert len(optimizer.param_groups) == 4
        norms = [stepped(optimizer, seed=step) for step in range(3)]
        runs[backend] = model, norms, optimizer.state_dict()
    (ours, our_norms, our_state), (theirs, norms, state) = runs["triton"], runs["torch"]
    assert our_norms == pytest.approx(norms, rel=1e-6)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        compare.assert_close(a, b, 1e-6, name)
    assert float(ours.logit_scale.detach()) <= MAX_LOGIT_SCALE
    for i, entry in state["inner"][0]["state"].items():
        for key, value in entry.items():
            compare.assert_close(our_state["inner"][0]["state"][i][key], value, 1e-6, f"{key} {i}")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_a_step_on_a_gpu_waits_for_nothing(stage):
    optimizer = Optimizer(CLIP4IDC(CONFIG).cuda(), stage, getattr(PRESETS["clevr"], stage), 100)
    stepped(optimizer)
    for p in optimizer.parameters:
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_update_follows_the_schedule():
    """`Optimizer.set_rates` before each replay is all that a captured `update` needs."""
    recipe = dataclasses.replace(PRESETS["clevr"].adapt, warmup=0.5, lr=1e-2)
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        optimizer = Optimizer(CLIP4IDC(CONFIG).cuda(), "adapt", recipe, 10)
        stepped(optimizer)
        grads = [torch.full_like(p, 1e-3) for p in optimizer.parameters]

        def update(optimizer=optimizer, grads=grads):
            for p, g in zip(optimizer.parameters, grads, strict=True):
                p.grad = g
            optimizer.update()

        graph = torch.cuda.CUDAGraph()
        if captured:
            optimizer.set_rates()
            with torch.cuda.graph(graph):
                update()
        for _ in range(4):
            optimizer.set_rates()
            graph.replay() if captured else update()
            optimizer.steps += 1
        ends.append([p.detach().clone() for p in optimizer.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
