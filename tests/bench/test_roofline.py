"""Floors against the figures that performance.md prints (sections 1.1 to 1.5), restated here."""

import pytest

from bench import roofline
from bench.roofline import H200, Floor, Work
from fastidc.config import ModelConfig

B32 = ModelConfig()
B16 = ModelConfig(patch_size=16)
L14 = ModelConfig(patch_size=14, vision_width=1024, vision_layers=24, intra_layers=18, embed_dim=768)
US = 1e6


@pytest.mark.parametrize(
    ("floor", "gflop", "mb", "ideal", "kernels"),
    [
        (roofline.adaptation(B32), 51.6, 152, 65.4, 73.8),
        (roofline.captioning(B32), 61.9, 182, 78.4, 87.5),
        (roofline.captioning(B32, pairs=2), None, None, None, 147.5),
        (roofline.adaptation(B16), 201, 558, 255, 276.6),
        (roofline.captioning(B16), 247, 700, 312, 333.9),
        (roofline.adaptation(L14), 960, 1965, 1215, 1276),
    ],
)
def test_whole_steps(floor, gflop, mb, ideal, kernels):
    found = (floor.total().flops / 1e9, floor.total().bytes / 1e6, floor.ideal() * US, floor.seconds("both") * US)
    for got, want in zip(found, (gflop, mb, ideal, kernels), strict=True):
        assert want is None or got == pytest.approx(want, rel=3e-3)
    assert floor.seconds("fwd") + floor.seconds("bwd") == pytest.approx(floor.seconds("both"))


@pytest.mark.parametrize(
    ("sequences", "length", "heads", "causal", "forward", "backward"),
    [
        (2 * 1024, 50, 12, False, 147, 257),
        (4096, 100, 12, False, 590, 1029),
        (1024, 32, 8, True, 31, 55),
        (1024, 14, 8, True, 13.8, 24),
        (1024, 100, 8, False, 98, 172),
        (1024, 394, 12, False, 618, 1545),  # bound by its FLOPs
        (2 * 1024, 257, 16, False, 1011, 1763),
    ],
)
def test_attention(sequences, length, heads, causal, forward, backward):
    floor = roofline.attention(sequences, length, heads, causal=causal)
    assert floor.seconds("fwd") * US == pytest.approx(forward, rel=0.02)
    assert floor.seconds("bwd") * US == pytest.approx(backward, rel=0.02)


def test_losses():
    assert roofline.info_nce(1024, 512).forward[0].flops == pytest.approx(1.07e9, rel=5e-3)
    assert roofline.info_nce(16384, 512).seconds("both") * 1e3 == pytest.approx(1.39, rel=5e-3)
    for tokens, frozen, biased, trained in ((1792, 230, 344, 459), (14336, 1836, 2754, 3672)):
        for flags, want in (({"bias": False, "trained": False}, frozen), ({"trained": False}, biased), ({"trained": True}, trained)):
            assert roofline.linear_cross_entropy(tokens, 49408, 512, **flags).seconds("both") * US == pytest.approx(want, rel=5e-3)


def test_optimiser_and_decoding():
    assert roofline.optimizer(123.6e6).seconds("step") * 1e3 == pytest.approx(0.80, rel=0.01)
    decode = roofline.generation(B32, 64)
    assert decode.forward[-1].seconds() * US == pytest.approx(28, rel=0.02)
    assert 64 / decode.seconds("fwd") == pytest.approx(
        25_000, rel=0.1
    )  # the towers at their kernel floor, where 1.5 takes their FLOPs alone


def test_floor_takes_the_larger_time():
    floor = Floor((Work(H200.flops, 0), Work(0, 2 * H200.bytes)), (Work(H200.flops, 3 * H200.bytes),))
    assert (floor.seconds("fwd"), floor.seconds("bwd"), floor.seconds("both")) == pytest.approx((3, 3, 6))
    assert floor.ideal() == pytest.approx(5)
