"""Groups, freezing, schedules and optimisers, with the official name rules written out a second time."""

import dataclasses
import math

import pytest
import torch
import worlds

from fastidc.checkpoint import our_name
from fastidc.config import PRESETS
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.reference import bert_adam
from fastidc.train.optim import MAX_LOGIT_SCALE, Optimizer, parameter_groups, schedule

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
