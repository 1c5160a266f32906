"""Dropout of the attention kernels: the reference's mask, drawn again in the backward pass, and a fair one."""

import compare
import pytest
import torch
from attention_cases import (
    CAPTIONS,
    DEVICE,
    EXACT,
    EXACT_TOLERANCE,
    FAMILIES,
    WHERE,
    cross_run,
    noise,
    self_run,
    with_gradients,
)
from torch import Tensor

from fastidc import ops
from fastidc.reference import attention as reference

pytestmark = WHERE


def mask_of(seed, dropout_p: float, sequences: int = 4, heads: int = 2, rows: int = 32, columns: int = 100) -> Tensor:
    """What the kernel keeps, [S, H, rows, columns]: with equal scores and unit vectors for values, the output is the mask, scaled."""
    kept = []
    for start in range(0, columns, 32):  # 32 keys have a value of their own in one call
        q = torch.zeros(sequences, rows, heads * 32, device=DEVICE)
        values = torch.zeros(columns, 32, device=DEVICE)
        width = min(32, columns - start)
        values[start : start + width, :width] = torch.eye(width, device=DEVICE)
        kv = torch.cat([torch.zeros(columns, heads * 32, device=DEVICE), values.repeat(1, heads)], dim=-1).expand(sequences, -1, -1)
        seeds = torch.tensor(seed, device=DEVICE)
        out = ops.cross_attention(q, kv.contiguous(), heads, dropout_p=dropout_p, seed=seeds, backend="triton")
        kept.append(out.unflatten(-1, (heads, 32)).transpose(1, 2)[..., :width] > 0)
    return torch.cat(kept, dim=-1)


def test_dropout_is_the_reference_s_mask():
    for seed in ((0, 0), (-5, (7 << 33) | 3), (2**62 + 11, -1)):
        found = mask_of(seed, 0.3)
        assert torch.equal(found, reference.kept(torch.tensor(seed, device=DEVICE), 0.3, found.shape))


@pytest.mark.parametrize("family", ["causal 14", "self 100", "packed causal", "cross 32x100"])
def test_dropout_gradients(family):
    """The backward pass draws the forward pass's mask: values and gradients are the reference's."""
    _, shapes = FAMILIES[family]
    more = {"dropout_p": 0.1, "seed": torch.tensor([12, 34], device=DEVICE)}
    if family.startswith("cross"):
        run = cross_run(2, **more)
    else:
        run = self_run(2, causal="causal" in family, lengths=CAPTIONS if family.startswith("packed") else None, **more)
    inputs = [noise(*shape, dtype=EXACT, seed=i) for i, shape in enumerate(shapes)]
    expected = with_gradients(lambda *x: run(*x, backend="reference"), [x.double() for x in inputs])
    for got, want in zip(with_gradients(run, inputs), expected, strict=True):
        compare.assert_close(got, want, EXACT_TOLERANCE, family)


def test_mask_statistics():
    """As many kept as asked for, in all and at every place, and no place, head, sequence, offset or seed tells of another."""
    p, draws = 0.1, 64
    masks = torch.stack([reference.kept(torch.tensor([s, o]), p, (8, 8, 32, 100)) for s in range(8) for o in range(8)]).double()
    count = masks.numel()
    assert abs(float(masks.mean()) - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    places = masks.mean(dim=(0, 1, 2))  # [32, 100], each of 4,096 draws
    assert float((places - (1 - p)).abs().max()) < 5.5 * (p * (1 - p) / (draws * 64)) ** 0.5
    assert float(places.var() / (p * (1 - p) / (draws * 64))) == pytest.approx(1, abs=0.15)
    centred = (masks - (1 - p)) / (p * (1 - p)) ** 0.5

    def correlation(a: Tensor, b: Tensor) -> float:
        return float((a * b).mean()) * a.numel() ** 0.5  # in standard deviations

    for name, a, b in (
        ("next key", centred[..., 1:], centred[..., :-1]),
        ("next query", centred[..., 1:, :], centred[..., :-1, :]),
        ("diagonal", centred[..., 1:, 1:], centred[..., :-1, :-1]),
        ("next head", centred[:, :, 1:], centred[:, :, :-1]),
        ("next sequence", centred[:, 1:], centred[:, :-1]),
        ("next offset", centred.unflatten(0, (8, 8))[:, 1:], centred.unflatten(0, (8, 8))[:, :-1]),
        ("next seed", centred.unflatten(0, (8, 8))[1:], centred.unflatten(0, (8, 8))[:-1]),
    ):
        assert abs(correlation(a, b)) < 5, name


def test_almost_everything_may_be_dropped():
    assert not mask_of((0, 0), 1 - 2**-34, sequences=1, heads=1, rows=4, columns=8).any()


def test_dropout_draws_from_torch_s_generator():
    qkv = noise(2, 30, 3 * 32, dtype=torch.float32).detach()

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [ops.self_attention(qkv, 2, dropout_p=0.3, backend="triton") for _ in range(2)]

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_philox_is_philox():
    """Known answers of Random123's own test file."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(w) for w in reference.philox([zero] * 4, [zero] * 2)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in reference.philox([ones] * 4, [ones] * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
