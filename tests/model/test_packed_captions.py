"""Captions without their pads: what the captioner computes for the words that are there is what it computes with padding."""

import compare
import pytest
import torch
import worlds
from torch.utils.flop_counter import FlopCounterMode

from fastidc.config import PAD_ID
from fastidc.data.loaders import PairBatch
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.packed import PackedCaptions, PackedText, caption_lengths, length_bucket, token_bucket

SAMPLES, PAIRS, REPEATS, LONGEST = 3, 2, 2, 9


def captions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and target_ids [B, P, R, T]; one caption has the pad id inside, as the word that it also is, and one is a lone end token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LONGEST + 1, (SAMPLES, PAIRS, REPEATS), generator=g)
    lengths[0, 0, 0], lengths[1, 1, 1] = LONGEST, 1
    words = torch.randint(1, 100, (SAMPLES, PAIRS, REPEATS, LONGEST), generator=g)
    words[0, 0, 0, 4] = PAD_ID
    place = torch.arange(LONGEST)
    targets = torch.where(place == lengths[..., None] - 1, worlds.SMALL.end_id, words)
    targets = torch.where(place < lengths[..., None], targets, PAD_ID)
    inputs = torch.cat([torch.full_like(targets[..., :1], worlds.SMALL.start_id), words[..., :-1]], dim=-1)
    return torch.where(place < lengths[..., None], inputs, PAD_ID), targets


FILLED = {"kinds": (64, 96), "longest": 16}


def build(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[CLIP4IDC, torch.Tensor]:
    torch.manual_seed(0)
    model = CLIP4IDC(worlds.SMALL.replace(dropout=dropout)).to(dtype).train()
    return model, torch.randn(SAMPLES, PAIRS, 2 * worlds.SMALL.image_tokens, worlds.SMALL.embed_dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("filled", [{}, FILLED], ids=["exact", "filled"])
def test_rows_and_cells(filled):
    inputs, targets = captions()
    packed = PackedCaptions.of(inputs, targets, **filled)
    lengths, longest = caption_lengths(targets), packed.text.longest
    grid = packed.text.ids[packed.rows].view(SAMPLES, PAIRS, REPEATS, longest)
    for index in torch.cartesian_prod(*map(torch.arange, (SAMPLES, PAIRS, REPEATS))).tolist():
        length = int(lengths[tuple(index)])
        assert torch.equal(grid[tuple(index)][:length], inputs[tuple(index)][:length])
        assert set(grid[tuple(index)][length:].tolist()) <= {int(inputs[tuple(index)][length - 1])}, "a pad's row is its own caption's"
    row = torch.arange(len(packed.text.ids))
    real = packed.targets != PAD_ID
    assert torch.equal(row[packed.rows][packed.cells][real], row[real])
    by_kind = packed.targets.split(packed.kinds)
    assert [int((kind != PAD_ID).sum()) for kind in by_kind] == (targets != PAD_ID).sum(dim=(0, 2, 3)).tolist()
    assert sum(packed.kinds) == len(packed.text.ids) == int(packed.text.cu_seqlens[-1])
    assert int(packed.text.cu_seqlens.diff().max()) <= longest


def test_a_caption_may_say_the_pad_s_word():
    _, targets = captions()
    assert int(caption_lengths(targets)[0, 0, 0]) == LONGEST
    assert int(caption_lengths(targets)[1, 1, 1]) == 1
    assert int(caption_lengths(torch.zeros(4, dtype=torch.long))) == 1


def test_filled_tensors_have_one_size():
    """Whatever the captions: their numbers alone differ."""
    shapes = set()
    for seed in range(5):
        packed = PackedCaptions.of(*captions(seed), **FILLED)
        shapes.add((packed.text.ids.shape, packed.text.cu_seqlens.shape, packed.cells.shape, packed.rows.shape, packed.targets.shape))
    assert len(shapes) == 1
    assert (
        PairBatch(torch.zeros(SAMPLES), [], captions=packed).target_counts().tolist()
        == (captions(4)[1] != PAD_ID).sum(dim=(0, 2, 3)).tolist()
    )
    with pytest.raises(ValueError, match="do not fit into 8"):
        PackedCaptions.of(*captions(), kinds=(8, 96), longest=16)


@pytest.mark.parametrize("filled", [{}, FILLED], ids=["exact", "filled"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
def test_the_same_loss_and_gradients_with_less_work(dtype, limit, filled):
    model, tokens = build(dtype)
    inputs, targets = captions()
    packed = PackedCaptions.of(inputs, targets, **filled)
    wanted = [tokens, model.text_encoder.token_embedding, *model.captioner.parameters()]
    names = ["tokens", "words", *(name for name, _ in model.captioner.named_parameters())]
    found, flops = [], []
    for run in (lambda: model.token_losses(tokens, inputs, targets), lambda: model.packed_token_losses(tokens, packed)):
        with FlopCounterMode(display=False) as counter:
            losses = run()
            losses.sum().backward()
        found.append((losses.detach(), [x.grad for x in wanted]))
        for x in wanted:
            x.grad = None
        flops.append(counter.get_total_flops())
    (loss, want), (loss_packed, got) = found
    compare.assert_close(loss_packed, loss, limit, "losses")
    scale = torch.stack([g.norm() for g in want]).norm()
    for name, a, b in zip(names, got, want, strict=True):
        assert (a - b).norm() <= limit * scale, name
    if not filled:
        assert flops[1] < 0.9 * flops[0]


def test_dropout_is_at_work():
    model, tokens = build(dropout=0.3)
    packed = PackedCaptions.of(*captions(), **FILLED)
    torch.manual_seed(1)
    first, second = (model.packed_token_losses(tokens, packed) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, model.packed_token_losses(tokens, packed))
    assert not torch.equal(first, second)


def test_compiled():
    """The captioner takes packed captions as one graph, without a break."""
    model, tokens = build()
    packed = PackedCaptions.of(*captions(), **FILLED)
    want = model.packed_token_losses(tokens, packed)
    torch._dynamo.reset()
    model.captioner.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    compare.assert_close(model.packed_token_losses(tokens, packed), want, compare.FP64_MODEL)


# ---- the text tower's


def test_text_with_fillers():
    model, _ = build()
    words = [[worlds.SMALL.start_id, *range(1, n), worlds.SMALL.end_id] for n in (3, 9, 5)]
    text = PackedText.of(words)
    filled = text.filled(64, 16)
    assert len(filled) == len(text) == 3
    assert (len(filled.ids), filled.longest) == (64, 16)
    assert torch.equal(filled.padded(12), text.padded(12))
    compare.assert_close(model.encode_text(filled), model.encode_text(text), compare.FP64_MODEL)
    assert torch.equal(filled[1:3].padded(), text[1:3].padded())
    with pytest.raises(ValueError, match="do not fit into 16"):
        text.filled(16, 16)


def test_buckets():
    for tokens in (1, 31, 32, 33, 448, 896, 1025, 14_300):
        size = token_bucket(tokens)
        assert tokens <= size < max(tokens + 32, 1.07 * tokens)
        assert size % 32 == 0
        assert token_bucket(size) == size
    assert len({token_bucket(tokens) for tokens in range(860, 940)}) <= 4
    assert [length_bucket(length, 77) for length in (1, 8, 9, 32, 65, 77)] == [8, 8, 16, 32, 77, 77]
    assert length_bucket(5, 6) == 6
    with pytest.raises(FastidcError, match="captions of 7 tokens exceed the model's 6 positions"):
        length_bucket(7, 6)
