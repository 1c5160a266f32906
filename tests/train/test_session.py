"""What a session puts together of the policy: each acceleration that is on reaches the trainer and the model."""

import dataclasses

import pytest
import torch
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.config import PRESETS
from fastidc.data.images import ImageStore
from fastidc.data.records import load_records
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import Linear
from fastidc.train import session as module
from fastidc.train.distributed import ALONE
from fastidc.train.policy import Part
from fastidc.train.precision import Precision
from fastidc.train.session import Session

CPU = torch.device("cpu")
CONFIG = worlds.SMALL.replace(vocab_size=49408, context_length=77)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    data = worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", {"train": list(range(4)), "val": [], "test": []})
    return load_records(data)["train"]


def build(records, stage="finetune", precision="bf16", **how) -> Session:
    recipe = dataclasses.replace(getattr(PRESETS["clevr"], stage), batch_size=2, epochs=1)
    model = CLIP4IDC(CONFIG.replace(captioner_layers=0) if stage == "adapt" else CONFIG)
    return Session(stage, recipe, model, records, ImageStore(CONFIG.image_size), ALONE, CPU, Precision(precision, "cpu"), 1, **how)


def with_policy(monkeypatch, **parts: bool) -> list[dict]:
    """Has those parts on, whatever the device; returns what the policy is asked."""
    asked = []
    original = module.policy

    def policy(*args, **choices):
        asked.append(choices)
        usual = {name: "auto" if name != "fp8" else False for name in choices}
        return dataclasses.replace(original(*args, **usual), **{name: Part(on, "a test") for name, on in parts.items()})

    monkeypatch.setattr(module, "policy", policy)
    return asked


def test_by_default_on_a_cpu(records):
    half, single = build(records), build(records, precision="fp32")
    assert half.model.shadows is not None
    assert half.policy.shadows.active
    assert single.model.shadows is None
    for session in (half, single):
        assert session.trainer.graphs is None
        assert session.fp8_products == 0
        assert all(layer.fp8_rows is None for layer in session.model.modules() if isinstance(layer, Linear))


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_graphs(records, monkeypatch, wanted):
    asked = with_policy(monkeypatch, graph=True)
    session = build(records, graph=wanted)
    assert asked == [{"compiling": "auto", "graph": wanted, "fp8": False}]
    assert session.trainer.graphs is not None
    assert (session.trainer.graphs.instead is None) == (wanted == "on"), "asked for, it is an error where it cannot be"


def test_fp8(records, monkeypatch):
    asked = with_policy(monkeypatch, fp8=True)
    with pytest.raises(FastidcError, match="--fp8: no product of this model is large enough"):
        build(records, fp8=True)
    assert asked[0]["fp8"]
    monkeypatch.setattr("fastidc.train.fp8.gains", lambda weight: True)
    assert build(records, fp8=True).fp8_products > 0


def test_buckets(records, monkeypatch):
    with_policy(monkeypatch, buckets=True)
    given = {}
    original = module.Trainer
    monkeypatch.setattr(module, "Trainer", lambda *args, **how: given.update(how) or original(*args, **how))
    build(records)
    assert given["reduce_dtype"] == torch.bfloat16
    with_policy(monkeypatch, buckets=False)
    build(records)
    assert given["reduce_dtype"] is None


def test_a_model_that_had_shadows_is_trained_without(records):
    """Its parameters have taken gradients in bf16."""
    session = build(records)
    for p in session.optimizer.parameters:
        p.grad_dtype = torch.bfloat16
    Precision("fp32", "cpu").prepare(session.model)
    assert all(p.grad_dtype == torch.float32 for p in session.model.parameters())
