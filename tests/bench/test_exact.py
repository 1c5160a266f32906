"""The truths in pieces against the reference in one piece, and the closed forms that a family states for itself."""

import pytest
import torch

from bench import exact
from bench.families import attention, patches, steps
from fastidc.config import PAD_ID
from fastidc.reference import attention as reference_attention
from fastidc.reference import info_nce as reference_info_nce
from fastidc.reference import linear_cross_entropy as reference_linear_cross_entropy


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def same(actual, expected, inputs):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    wants = [x for x in inputs if x.requires_grad]
    pairs = zip(torch.autograd.grad(actual.sum(), wants), torch.autograd.grad(expected.sum(), wants), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("piece", [1, 20, 10**6])
def test_losses_in_pieces(piece, monkeypatch):
    monkeypatch.setattr(exact, "PIECE", piece)
    text, pair, scale = noise(7, 5), noise(7, 5, seed=1), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    same(exact.info_nce(text, pair, scale), reference_info_nce.info_nce(text, pair, scale), (text, pair, scale))
    x, weight, bias = noise(9, 5), noise(11, 5, seed=2), noise(11, seed=3)
    targets = torch.tensor([3, 0, 5, 10, 0, 1, 1, 2, 9])
    assert PAD_ID == 0
    arguments = (x, weight, bias, targets)
    same(exact.linear_cross_entropy(*arguments), reference_linear_cross_entropy.linear_cross_entropy(*arguments), arguments)


def test_ragged_attention_is_attention_of_each():
    lengths = [3, 1, 5]
    qkv = noise(9, 24)
    each = [reference_attention.self_attention(part[None], 2, True)[0] for part in qkv.split(lengths)]
    same(exact.ragged_attention(qkv, lengths, 6, 2), torch.cat(each), (qkv,))


def test_packed_lengths_average_14():
    lengths = attention.caption_lengths(4096, 32)
    assert (min(lengths), max(lengths)) == (10, 18)
    assert sum(lengths) / len(lengths) == pytest.approx(14, abs=0.2)


def test_adamw_is_torchs():
    tensors = [[noise(4, 3, seed=i).detach()] for i in range(3)]
    second = [noise(4, 3, seed=3).detach().abs()]
    p = torch.nn.Parameter(tensors[0][0].clone())
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    p.grad = tensors[1][0].clone()
    optimizer.state[p] = {"step": torch.tensor(9.0), "exp_avg": tensors[2][0].clone(), "exp_avg_sq": second[0].clone()}
    optimizer.step()
    torch.testing.assert_close(exact.adamw(*tensors, second, 0.1)[0], p.detach(), rtol=1e-10, atol=1e-12)


def test_patches_are_a_convolutions_rows():
    images = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)
    weight = noise(6, 3, 4, 4).detach()
    rows = patches.truth(images, torch.tensor([1, 0]), 4, torch.float64)
    convolved = torch.nn.functional.conv2d(images[[1, 0]].permute(0, 3, 1, 2).double(), weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows @ weight.flatten(1).T, convolved)


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_batches_are_well_formed(stage):
    from bench.cases import TINY

    batch = steps.batch_of(TINY, stage, 3)
    assert batch.images.shape == (3, 2 if stage == "adapt" else 3, 32, 32, 3)
    if stage == "adapt":
        ids = batch.text.padded()
        assert (ids[:, 0] == TINY.start_id).all()
        assert (ids == TINY.end_id).sum(1).tolist() == [1, 1, 1]
        return
    inputs, targets = batch.input_ids.flatten(0, 2), batch.target_ids.flatten(0, 2)
    for given, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        length = wanted.index(TINY.end_id) + 1
        assert given[0] == TINY.start_id
        assert given[1:length] == wanted[: length - 1]
        assert not any(given[length:])
        assert not any(wanted[length:])
