"""The model against the reference on weights of our own, in fp64, for every split; and what only the model has."""

import compare
import pytest
import torch
import worlds

from fastidc.checkpoint import to_official
from fastidc.config import ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.reference import clip4idc as reference
from fastidc.train.objectives import Adaptation, Captioning

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)  # the official head size, which the reference fixes


def build(tmp_path, config=CONFIG, stage="caption"):
    """(model, official weights as leaves) in fp64, the model through the real reader."""
    state = worlds.with_aliases(worlds.official_state(config, "caption"))
    path = tmp_path / "pytorch_model.bin.3"
    torch.save(state, path)
    model = CLIP4IDC.from_pretrained(path, intra_layers=config.intra_layers).double().eval()
    unique = {id(t): t.double().requires_grad_() for t in state.values()}
    return model, {key: unique[id(t)] for key, t in state.items()}


def inputs(config=CONFIG, batch=3, length=9):
    g = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 2, 3, config.image_size, config.image_size, generator=g, dtype=torch.float64)
    ids = torch.randint(1, config.vocab_size - 2, (batch, length), generator=g)
    ids[:, 0], ids[:, -2], ids[:, -1] = config.start_id, config.end_id, 0
    return images, ids


@pytest.mark.parametrize("intra_layers", [1, 2, 3])
def test_model_is_the_reference(tmp_path, intra_layers):
    """Loss and every gradient of both stages, from 1 + 2 to 3 + 0 layers."""
    config = CONFIG.replace(intra_layers=intra_layers)
    model, w = build(tmp_path, config)
    images, ids = inputs(config)
    before, after = images.unbind(1)
    masks = (ids != 0).long()
    targets = torch.cat([ids[:, 1:], ids.new_zeros(len(ids), 1)], dim=1)
    pairs = {
        "adapt": (model.adaptation_loss(before, after, ids), reference.adaptation_loss(w, images, ids, intra_layers)),
        "caption": (
            model.caption_loss(before, after, ids, targets),
            reference.caption_loss(w, images, ids, masks, targets, intra_layers),
        ),
    }
    for stage, (actual, expected) in pairs.items():
        compare.assert_close(actual, expected, compare.FP64_MODEL, stage)
        actual.backward()
        expected.backward()
        touched = [key for key, t in w.items() if t.grad is not None]
        assert len(touched) > 40
        names = dict(model.named_parameters())
        grads = to_official({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in names.items()}, touched)
        scale = torch.stack([w[key].grad.norm() for key in touched]).norm()
        for key in touched:
            error = (grads[key] - w[key].grad).norm() / scale
            assert error < compare.FP64_MODEL, f"{stage}: gradient of {key} is off by {error:.3g} of the global norm"
        for t in (*names.values(), *w.values()):
            t.grad = None


def test_own_golden_greedy(tmp_path):
    """Cached decoding gives the ids of the uncached reference."""
    model, w = build(tmp_path)
    images, _ = inputs(batch=8)
    expected = reference.greedy(w, images, CONFIG.intra_layers, CONFIG.start_id, 20)
    assert model.generate(*images.unbind(1), max_length=20, stop_early=False).tolist() == expected.tolist()
    assert len({tuple(row) for row in expected.tolist()}) > 1, "equal captions everywhere would show nothing"


def test_generate_stops_after_the_end_token(tmp_path):
    model, _ = build(tmp_path)
    with torch.no_grad():
        model.captioner.head_bias[model.config.end_id] = 1e3
    images, _ = inputs()
    ids = model.generate(*images.unbind(1), max_length=12)
    assert ids.tolist() == [[model.config.end_id] + [0] * 11] * 3


def test_uint8_and_normalised_images_agree(tmp_path):
    model, _ = build(tmp_path)
    raw = torch.randint(0, 256, (2, 2, 3, 48, 48), dtype=torch.uint8)
    embed = model.pair_encoder.patch_embed
    normalised = (raw.double() / 255 - embed.mean) / embed.std
    compare.assert_close(model.encode_pair(*raw.unbind(1))[0], model.encode_pair(*normalised.unbind(1))[0], 1e-12)


def test_batch_entry_equals_the_wrappers(tmp_path):
    """One forward over (before, after, distractor) gives each pair's own loss, the before-image encoded once."""
    model, _ = build(tmp_path)
    images = torch.randint(0, 256, (4, 3, 48, 48, 3), dtype=torch.uint8)
    _, ids = inputs(batch=4)
    both = torch.stack([ids, ids.roll(1, 0)], dim=1)
    targets = torch.cat([both[..., 1:], both.new_zeros(4, 2, 1)], dim=-1)
    batch = PairBatch(images, list("abcd"), ids, both[:, :, None], targets[:, :, None])
    encoded = []
    hook = model.pair_encoder.patch_embed.register_forward_hook(lambda m, args, out: encoded.append(len(out)))
    losses = model(batch, [Adaptation(), Captioning()])
    hook.remove()
    assert encoded == [12], "12 distinct images of 8 pairs pass intra once each"
    first, second, third = (images[:, k].permute(0, 3, 1, 2) for k in range(3))
    compare.assert_close(losses["info_nce"], model.adaptation_loss(first, second, ids), 1e-12)
    separate = model.caption_loss(first, second, both[:, 0], targets[:, 0]) + model.caption_loss(first, third, both[:, 1], targets[:, 1])
    compare.assert_close(losses["caption"], separate, 1e-12)


def test_captions_of_a_pair_share_its_memory(tmp_path):
    """R captions a pair in one pass: the token mean over all of them, as R passes would give it."""
    model, _ = build(tmp_path)
    tokens = torch.randn(3, 2, 10, 64, dtype=torch.float64)
    ids = torch.randint(1, 100, (3, 2, 4, 7))
    targets = torch.cat([ids[..., 1:], ids.new_zeros(3, 2, 4, 1)], dim=-1)
    together = model.token_losses(tokens, ids, targets)
    apart = torch.stack([model.token_losses(tokens, ids[:, :, r, None], targets[:, :, r, None]) for r in range(4)])
    compare.assert_close(together, apart.mean(0), 1e-12)  # every caption has the same number of targets here


@pytest.mark.parametrize("intra_layers", [1, 2, 3])
def test_adaptation_computes_class_tokens_alone(tmp_path, intra_layers):
    """The shortcut of the adaptation step leaves the loss and every gradient as they are."""
    config = CONFIG.replace(intra_layers=intra_layers)
    model, _ = build(tmp_path, config)
    images, ids = torch.randint(0, 256, (4, 2, 48, 48, 3), dtype=torch.uint8), inputs(config, batch=4)[1]
    results = {}
    for reads_tokens in (False, True):
        model.zero_grad(set_to_none=True)
        loss = model(PairBatch(images, list("abcd"), ids), [Adaptation(reads_tokens=reads_tokens)])["info_nce"]
        loss.backward()
        results[reads_tokens] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert results[False].keys() == results[True].keys()
    scale = torch.stack([g.norm() for g in results[True].values()]).norm()
    for name, expected in results[True].items():
        assert (results[False][name] - expected).norm() <= compare.FP64_MODEL * scale, name


def test_difference_input_is_not_the_paper(tmp_path):
    """pair_input="difference" feeds after - before, and nothing else changes."""
    model, _ = build(tmp_path)
    images, _ = inputs()
    before, after = (model.pair_encoder.intra(x) for x in images.unbind(1))
    paper = model.pair_encoder.inter(before, after)
    model.pair_encoder.difference = True
    compare.assert_close(model.pair_encoder.inter(before, after + before), paper, 1e-12)
    assert compare.relative_error(model.pair_encoder.inter(before, after), paper) > 1e-3


def test_pads_after_the_end_change_nothing(tmp_path):
    model, _ = build(tmp_path)
    images, ids = inputs()
    longer = torch.cat([ids, ids.new_zeros(3, 5)], dim=1)
    compare.assert_close(model.encode_text(longer), model.encode_text(ids), 1e-12)
    before, after = images.unbind(1)
    targets = torch.cat([longer[:, 1:], longer.new_zeros(3, 1)], dim=1)
    short = model.caption_loss(before, after, ids, targets[:, : ids.shape[1]])
    compare.assert_close(model.caption_loss(before, after, longer, targets), short, 1e-12)


def test_bf16_autocast_stays_close(tmp_path):
    model, _ = build(tmp_path)
    model = model.float()
    images, ids = inputs()
    before, after = images.float().unbind(1)
    exact = model.adaptation_loss(before, after, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.adaptation_loss(before, after, ids)
        assert model.pair_encoder.intra(before).dtype == torch.bfloat16, "the residual stream is bf16"
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() - exact.item()) < 0.02 * exact.item()


def test_sentences_for_wrong_calls(tmp_path):
    model, _ = build(tmp_path)
    images, ids = inputs()
    before, after = images.unbind(1)
    with pytest.raises(FastidcError, match="captions of 40 tokens exceed the model's 24 positions"):
        model.encode_text(torch.ones(1, 40, dtype=torch.long))
    with pytest.raises(FastidcError, match="max_length 25 exceeds the model's 24 positions"):
        model.generate(before, after, max_length=25)
    with pytest.raises(ValueError, match=r"before \[3, 3, 48, 48\].* and after \[2, 3, 48, 48\]"):
        model.encode_pair(before, after[:2])
    with pytest.raises(ValueError, match=r"images must be \[N, 3, 48, 48\]"):
        model.encode_pair(before[..., :32], after[..., :32])
    model.drop_captioner()
    with pytest.raises(FastidcError, match="this model has no captioner"):
        model.caption_loss(before, after, ids, ids)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"intra_layers": 13}, "intra_layers 13 lies outside the model; with 12 vision layers choose 1 to 12"),
        ({"intra_layers": 0}, "intra_layers 0 lies outside the model"),
        ({"patch_size": 30}, "image_size 224 is not a multiple of patch_size 30"),
        ({"pair_input": "minus"}, 'pair_input must be "concat" or "difference"'),
        ({"vocabulary": (1, 2), "vocab_size": 2}, "vocabulary must be ascending BPE ids that include 0, 49406 and 49407"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"embed_dim": 100}, "embed_dim 100 is not a multiple of head_dim 64"),
        ({"vision_layers": 0}, "vision_layers must be a positive integer"),
    ],
)
def test_config_refuses(changes, sentence):
    with pytest.raises(FastidcError, match=sentence):
        ModelConfig(**changes)
