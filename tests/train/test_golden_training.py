"""Six steps of the official optimiser: losses, gradient norms and weights."""

import compare
import golden
import pytest
import torch

from fastidc import checkpoint
from fastidc.config import Recipe
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.reference import bert_adam
from fastidc.reference import clip4idc as reference
from fastidc.train.optim import Optimizer

NAMES = [(stage, name) for stage, names in golden.STAGES.items() for name in names]


def check(g, losses, norms, after):
    for key, got in (("train/losses", losses), ("train/grad_norms", norms)):
        for step, (a, b) in enumerate(zip(got, g[key].tolist(), strict=True)):
            tolerance = compare.GOLDEN_TRAIN_LOSS if key == "train/losses" else compare.GOLDEN_GRAD_NORM
            assert abs(a - b) <= tolerance * abs(b), f"{key}[{step}] is {a!r}, expected {b!r}"
    for key, expected in g.after.items():
        compare.assert_close(after[key], expected, compare.GOLDEN_TRAIN_AFTER, key)


def official_recipe(g, stage) -> Recipe:
    o = g.meta["optimizer"]
    r = o["recipes"][stage]
    return Recipe(
        epochs=1,
        batch_size=len(g.images),
        lr=o["lr"],
        coef_lr=o["coef_lr"],
        optimizer="bert_adam",
        schedule=r["schedule"],
        betas=(r["b1"], r["b2"]),
        eps=r["e"],
        weight_decay=r["weight_decay"],
        warmup=o["warmup"],
        clip_norm=o["clip_grad_norm"],
        freeze_layers=o["freeze_layer_num"],
    )


@pytest.mark.parametrize(("stage", "name"), NAMES)
def test_golden_training_model(stage, name, tmp_path):
    g = golden.load(name)
    torch.save(g.weights, tmp_path / "pytorch_model.bin.0")
    model = CLIP4IDC.from_pretrained(tmp_path / "pytorch_model.bin.0", intra_layers=g.intra_layers).eval()
    optimizer = Optimizer(
        model, {"adapt": "adapt", "caption": "finetune"}[stage], official_recipe(g, stage), g.meta["optimizer"]["t_total"]
    )
    before, after = g.images.unbind(1)
    losses, norms = [], []
    for _ in range(g.meta["optimizer"]["steps"]):
        if stage == "adapt":
            loss = model.adaptation_loss(before, after, g["input_ids"])
        else:
            loss = model.caption_loss(before, after, g["input_caption_ids"], g["output_caption_ids"])
        loss.backward()
        losses.append(loss.item())
        norms.append(float(optimizer.step()))
    check(g, losses, norms, checkpoint.to_official(dict(model.named_parameters()), list(g.after)))


FROZEN = {f"clip.{n}" for n in ("positional_embedding", "token_embedding.weight")} | {
    f"clip.visual.{n}" for n in ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
}
NEW = {f"clip.visual.{n}" for n in ("joint_positional_embedding", "bef_embedding", "aft_embedding", "ln_mid.weight", "ln_mid.bias")}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), NAMES)
def test_golden_training_reference(stage, name):
    """The reference model under the reference optimiser, with the official name rules written out."""
    g = golden.load(name)
    o, r = g.meta["optimizer"], g.meta["optimizer"]["recipes"][stage]
    unique = {id(t): t.clone() for t in g.weights.values()}
    w = {key: unique[id(t)] for key, t in g.weights.items()}
    first_name = {id(t): key for key, t in reversed(w.items())}
    train = {name: t for t, name in ((t, first_name[id(t)]) for t in unique.values()) if name not in FROZEN}
    for t in train.values():
        t.requires_grad_()
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in train.items()}
    factor = getattr(bert_adam, r["schedule"])
    losses, norms = [], []
    for step in range(o["steps"]):
        if stage == "adapt":
            loss = reference.adaptation_loss(w, g.images, g["input_ids"], g.intra_layers)
        else:
            loss = reference.caption_loss(w, g.images, g["input_caption_ids"], g["decoder_mask"], g["output_caption_ids"], g.intra_layers)
        loss.backward()
        losses.append(loss.item())
        live = {name: t for name, t in train.items() if t.grad is not None}
        norms.append(float(bert_adam.clip_grad_norm([t.grad for t in live.values()], o["clip_grad_norm"])))
        for name, t in live.items():
            full_rate = name in NEW if stage == "adapt" else not name.startswith("clip.")
            lr = o["lr"] * (1 if full_rate else o["coef_lr"]) * factor(step / o["t_total"], o["warmup"])
            decay = 0.0 if "bias" in name or "LayerNorm.weight" in name else r["weight_decay"]
            bert_adam.bert_adam_step(t, t.grad, *moments[name], lr, (r["b1"], r["b2"]), r["e"], decay, o["clip_grad_norm"])
            t.grad = None
    check(g, losses, norms, w)
