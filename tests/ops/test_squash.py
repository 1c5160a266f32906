"""The squash: the kernel's arithmetic through its host build, the reference, and Pillow, to the bit."""

import re

import numpy as np
import pytest
import torch
from patches_host import launches, pictures  # noqa: F401 - a fixture
from PIL import Image

from fastidc import ops
from fastidc.data.images import to_array
from fastidc.ops import _patches_cuda
from fastidc.ops.squash import rows_first
from fastidc_kernels import patches as kernels

SIZES = [(320, 480), (224, 224), (100, 37), (1, 1), (223, 225), (2, 700), (640, 480), (375, 500), (224, 300), (7, 5), (500, 333)]


def by_pillow(picture: torch.Tensor, size: int) -> torch.Tensor:
    return torch.from_numpy(to_array(Image.fromarray(picture.contiguous().numpy()), size).copy())


def by_kernel(given: list[torch.Tensor], size: int) -> torch.Tensor:
    return _patches_cuda.squash(given, size, [rows_first(*x.shape[:2], size) for x in given])


@pytest.mark.parametrize("size", [224, 32, 336, 1])
def test_is_pillow(launches, size):  # noqa: F811
    """Noise, which overshoots at every pixel: kernel, reference and Pillow agree in every value."""
    given = pictures(*SIZES)
    got, reference = by_kernel(given, size), ops.squash(given, size)
    for i, picture in enumerate(given):
        want = by_pillow(picture, size)
        assert torch.equal(got[i], want), f"the kernel, {SIZES[i]}"
        assert torch.equal(reference[i], want), f"the reference, {SIZES[i]}"


def test_the_order_of_passes_is_pillows(launches):  # noqa: F811
    """Around the sizes at which Pillow 13 takes the height first."""
    for width in (10, 31, 32, 33, 40, 64):
        for height in {32 + d for d in (-1, 0, 1)} | {2 * width - 32 + d for d in (-1, 0, 1, 2)}:
            (picture,) = pictures((max(height, 1), width), seed=height)
            assert torch.equal(by_kernel([picture], 32)[0], by_pillow(picture, 32)), (height, width)


def test_any_strides(launches):  # noqa: F811
    """A decoder's [3, H, W], a mirrored crop's rows, RGB out of RGBA, also where the height goes first."""
    for height, width in ((40, 60), (90, 40)):
        (picture,) = pictures((height, width))
        want = by_pillow(picture, 32)
        planar = picture.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        padded = torch.cat([picture, torch.zeros(height, width, 1, dtype=torch.uint8)], 2)[..., :3]
        rows = torch.zeros(height, width + 9, 3, dtype=torch.uint8)[:, 5 : width + 5]
        rows.copy_(picture)
        got = by_kernel([planar, padded, rows], 32)
        assert all(torch.equal(x, want) for x in got)


def test_launches(launches):  # noqa: F811
    by_kernel(pictures((30, 50), (70, 20)), 16)
    assert [seen[0] for seen in launches.seen] == ["squash_weights", "squash_columns", "squash_rows"]
    (_, weights, block, _), (_, columns, _, _), (_, rows, _, _) = launches.seen
    assert weights[0] * block[0] >= 2 * 2 * 16
    assert columns[0] * block[0] >= 70 * 16
    assert columns[1] == rows[1] == 2
    assert rows[0] * block[0] >= 16 * 16 * 3


def test_the_plan_has_room_for_every_weight():
    from fastidc.reference.squash import weights

    for length in (1, 31, 32, 33, 100, 1000):
        (picture,) = pictures((length, 3))
        _, rows, room = kernels.plan([picture], 32, [False])
        assert rows == length
        assert room >= int((weights(length, 32) != 0).sum(1).max())


def test_meta():
    given = [x.to("meta") for x in pictures((30, 50), (70, 20))]
    assert _patches_cuda.squash_fwd(given, 16, [False, True]).shape == (2, 16, 16, 3)


def test_refusals_are_sentences():
    (picture,) = pictures((5, 7))
    for given, size, sentence in (
        ([], 8, "squash takes at least one picture and a size of at least 1, got 0 and 8."),
        ([picture], 0, "got 1 and 0"),
        ([picture, picture.float()], 8, "picture 1 must be uint8 [H, W, 3] on cpu, with pixels, got torch.float32 [5, 7, 3] on cpu."),
        ([picture.permute(2, 0, 1)], 8, "picture 0 must be uint8 [H, W, 3] on cpu, with pixels, got torch.uint8 [3, 5, 7]"),
        ([picture[:0]], 8, "with pixels, got torch.uint8 [0, 7, 3]"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            ops.squash(given, size)
    with pytest.raises(ValueError, match="it runs on CUDA, not on cpu"):
        ops.squash([picture], 8, backend="cuda")


def test_flat_pictures_stay_flat():
    for level in (0, 1, 128, 254, 255):
        picture = torch.from_numpy(np.full((50, 70, 3), level, dtype=np.uint8))
        assert (ops.squash([picture], 32) == level).all()
