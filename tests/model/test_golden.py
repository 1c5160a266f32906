"""The reference and the model against the official code's own outputs."""

import compare
import golden
import pytest
import torch
from torch.nn import functional as F

from fastidc import checkpoint
from fastidc.config import END_ID, START_ID
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.reference import clip4idc as reference

ADAPT, CAPTION = golden.STAGES["adapt"], golden.STAGES["caption"]


def reference_weights(g):
    """The golden's weights as leaves, aliases still one tensor."""
    unique = {id(t): t.clone().requires_grad_() for t in g.weights.values()}
    return {key: unique[id(t)] for key, t in g.weights.items()}


def official_model(g, tmp_path):
    """The golden's weights, written as the official code would and read by the real loader."""
    path = tmp_path / "pytorch_model.bin.0"
    torch.save(g.weights, path)
    return CLIP4IDC.from_pretrained(path, intra_layers=g.intra_layers).eval()


@pytest.mark.parametrize("name", ADAPT)
def test_golden_adapt_reference(name):
    g = golden.load(name)
    w = reference_weights(g)
    embedding, hidden = reference.encode_pair(w, g.images, g.intra_layers)
    text, text_hidden = reference.encode_text(w, g["input_ids"])
    for key, value in (("pair_embedding", embedding), ("pair_hidden", hidden), ("text_embedding", text), ("text_hidden", text_hidden)):
        compare.assert_close(value, g[key], compare.GOLDEN_FORWARD, key)
    logits = reference_logits(text, embedding, w["clip.logit_scale"])
    compare.assert_close(logits, g["logits_text_by_pair"], compare.GOLDEN_FORWARD, "logits")
    loss = reference.adaptation_loss(w, g.images, g["input_ids"], g.intra_layers)
    compare.assert_close(loss, g["loss"], compare.GOLDEN_FORWARD, "loss")
    loss.backward()
    compare.assert_grad_norms({k: w[k].grad for k in g.grad_norms}, g.grad_norms)


def reference_logits(text, embedding, logit_scale):
    return logit_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(embedding, dim=-1).T


@pytest.mark.parametrize("name", ADAPT)
def test_golden_adapt_model(name, tmp_path):
    g = golden.load(name)
    model = official_model(g, tmp_path)
    before, after = g.images.unbind(1)
    embedding, tokens = model.encode_pair(before, after)
    text = model.encode_text(g["input_ids"])
    for key, value in (("pair_embedding", embedding), ("pair_hidden", tokens), ("text_embedding", text)):
        compare.assert_close(value, g[key], compare.GOLDEN_FORWARD, key)
    compare.assert_close(model.similarity(text, embedding), g["logits_text_by_pair"], compare.GOLDEN_FORWARD, "logits")
    loss = model.adaptation_loss(before, after, g["input_ids"])
    compare.assert_close(loss, g["loss"], compare.GOLDEN_FORWARD, "loss")
    loss.backward()
    compare.assert_grad_norms(official_grads(model, g), g.grad_norms)


def official_grads(model, g):
    return checkpoint.to_official({n: p.grad for n, p in model.named_parameters()}, list(g.grad_norms))


@pytest.mark.parametrize("name", CAPTION)
def test_golden_caption_reference(name):
    g = golden.load(name)
    w = reference_weights(g)
    _, hidden = reference.encode_pair(w, g.images, g.intra_layers)
    compare.assert_close(hidden, g["visual_hidden"], compare.GOLDEN_FORWARD, "visual_hidden")
    logits = reference.caption_logits(w, reference.caption_memory(w, hidden), g["input_caption_ids"], g["decoder_mask"])
    compare.assert_close(logits[..., ::97], g["logits_every_97th"], compare.GOLDEN_FORWARD, "logits")
    compare.assert_close(logits.logsumexp(-1), g["logits_logsumexp"], compare.GOLDEN_FORWARD, "logsumexp")
    loss = reference.caption_loss(w, g.images, g["input_caption_ids"], g["decoder_mask"], g["output_caption_ids"], g.intra_layers)
    compare.assert_close(loss, g["loss"], compare.GOLDEN_FORWARD, "loss")
    loss.backward()
    compare.assert_grad_norms({k: w[k].grad for k in g.grad_norms}, g.grad_norms)


@pytest.mark.parametrize("name", CAPTION)
def test_golden_caption_model(name, tmp_path):
    g = golden.load(name)
    model = official_model(g, tmp_path)
    before, after = g.images.unbind(1)
    compare.assert_close(model.encode_pair(before, after)[1], g["visual_hidden"], compare.GOLDEN_FORWARD, "visual_hidden")
    logits = model.caption_logits(before, after, g["input_caption_ids"])
    real = g["decoder_mask"].bool()  # rows of pad tokens have no meaning and no target
    compare.assert_close(logits[..., ::97][real], g["logits_every_97th"][real], compare.GOLDEN_FORWARD, "logits")
    compare.assert_close(logits.logsumexp(-1)[real], g["logits_logsumexp"][real], compare.GOLDEN_FORWARD, "logsumexp")
    loss = model.caption_loss(before, after, g["input_caption_ids"], g["output_caption_ids"])
    compare.assert_close(loss, g["loss"], compare.GOLDEN_FORWARD, "loss")
    loss.backward()
    compare.assert_grad_norms(official_grads(model, g), g.grad_norms)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTION)
def test_golden_greedy_reference(name):
    g = golden.load(name)
    ids = reference.greedy(g.weights, g.images, g.intra_layers, START_ID, g["greedy_ids"].shape[1])
    assert ids.tolist() == g["greedy_ids"].tolist()


@pytest.mark.parametrize("name", CAPTION)
def test_golden_greedy_model(name, tmp_path):
    g = golden.load(name)
    model = official_model(g, tmp_path)
    ids = model.generate(*g.images.unbind(1), max_length=32, stop_early=False)
    assert ids.tolist() == g["greedy_ids"].tolist()
    early = model.generate(*g.images.unbind(1), max_length=32)
    for row, raw in zip(early.tolist(), ids.tolist(), strict=True):
        length = raw.index(END_ID) + 1 if END_ID in raw else len(raw)
        assert row == raw[:length] + [0] * (len(raw) - length)
