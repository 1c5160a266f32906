"""Augmentation: its draws, and its pixels by the reference and by the kernel's arithmetic."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from patches_host import launches, pictures  # noqa: F401 - a fixture

from fastidc import ops
from fastidc.data import augment
from fastidc.data.augment import Augmentation
from fastidc.errors import FastidcError
from fastidc.ops import _patches_cuda
from fastidc.ops.patches import COLUMNS
from fastidc.reference import patches as reference

ALL = Augmentation(crop=0.5, brightness=0.4, contrast=0.4, saturation=0.4, noise=20.0, erase=0.7)
EACH = {
    "none": Augmentation(),
    "crop": Augmentation(crop=0.3),
    "brightness": Augmentation(brightness=1.0),
    "contrast": Augmentation(contrast=1.0),
    "saturation": Augmentation(saturation=1.0),
    "noise": Augmentation(noise=60.0),
    "erase": Augmentation(erase=1.0),
    "all": ALL,
    "all, colours apart": replace(ALL, same_colours=False),
}


def drawn(augmentation: Augmentation, count: int = 6, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([augmentation.draw(0, 1, f"sample {i}", 2, size) for i in range(count // 2)]))


def columns(parameters, *names: str) -> list[torch.Tensor]:
    return [torch.as_tensor(parameters)[..., COLUMNS.index(name)] for name in names]


@pytest.mark.parametrize("name", EACH)
def test_kernel_is_the_reference(launches, name):  # noqa: F811
    images, index = torch.stack(pictures(*[(32, 32)] * 4)), torch.tensor([3, 1, 0, 2, 3, 3])
    augmentation = EACH[name]
    parameters = drawn(augmentation)
    want = ops.patches(images, index, 8, augmentation=parameters, backend="reference")
    assert torch.equal(ops.patches(images, index, 8, augmentation=parameters, backend="torch"), want)
    assert torch.equal(_patches_cuda.patches(images, index, 8, parameters, torch.bfloat16), want)
    assert torch.equal(want, ops.patches(images, index, 8)) != bool(augmentation), "as it stands it changes nothing"


def test_images_that_are_not_square(launches):  # noqa: F811
    images, index = torch.stack(pictures((24, 40), (24, 40))), torch.tensor([1, 0])
    parameters = drawn(ALL, 2, 24)
    want = ops.patches(images, index, 8, augmentation=parameters, backend="reference")
    assert torch.equal(_patches_cuda.patches(images, index, 8, parameters, torch.bfloat16), want)


def test_parameters_that_make_no_sense_stay_inside(launches):  # noqa: F811
    """Whatever a caller writes, nothing outside of the image is read."""
    images, index = torch.stack(pictures((16, 16))), torch.zeros(3, dtype=torch.long)
    parameters = drawn(Augmentation(), 4, 16)[:3]
    parameters[0, :4] = torch.tensor([math.nan, -1e9, 1e9, math.nan])
    parameters[1, :4] = torch.tensor([1e30, -1e30, -50.0, 0.0])
    parameters[2, :4] = torch.tensor([-math.inf, math.inf, 5.0, 5.0])
    want = ops.patches(images, index, 8, augmentation=parameters, backend="reference")
    assert torch.equal(_patches_cuda.patches(images, index, 8, parameters, torch.bfloat16), want)


def test_noise_is_gaussian():
    place = torch.arange(300_000)
    key = [torch.tensor(x) for x in (12345, 54321)]
    noise = reference.noise(place, *key).double() / reference.NOISE_DEVIATION
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    for bound, part in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((noise.abs() < bound).double().mean() - part) < 0.012
    other = reference.noise(place, key[0] + 1, key[1]).double()
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.01


def test_philox_is_philox():
    """Against NumPy's generator of 4 x 64 there is nothing to compare; the published vector of 4 x 32-10 for zeros is 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    zero = torch.zeros(1, dtype=torch.long)
    assert int(reference.noise(zero, zero, zero)) == sum((word & 65535) + (word >> 16) for word in words) - 262140


# ---- draws


def test_draws_depend_on_their_keys_alone():
    first = ALL.draw(0, 1, "CLEVR_000001", 3, 224)
    assert np.array_equal(first, ALL.draw(0, 1, "CLEVR_000001", 3, 224))
    assert first.shape == (3, augment.COLUMNS)
    assert first.dtype == np.float32
    assert len(COLUMNS) == augment.COLUMNS
    for seed, epoch, sample in ((1, 1, "CLEVR_000001"), (0, 2, "CLEVR_000001"), (0, 1, "CLEVR_000002")):
        assert not np.array_equal(first, ALL.draw(seed, epoch, sample, 3, 224))
    assert np.array_equal(first[:2], ALL.draw(0, 1, "CLEVR_000001", 2, 224)), "a third image moves no draw of the others"


def test_what_a_pair_shares():
    shared = {"top", "left", "height", "width", "erase_top", "erase_left", "erase_height", "erase_width", "fill"}
    for same in (True, False):
        found = replace(ALL, same_colours=same, erase=1.0).draw(0, 0, "a", 2, 224)
        equal = {name for i, name in enumerate(COLUMNS) if found[0, i] == found[1, i]}
        colours = {"brightness", "contrast", "saturation", "noise"}
        assert equal == (shared | colours if same else shared)


def test_draws_keep_their_ranges():
    found = np.concatenate([ALL.draw(0, 0, str(i), 2, 200) for i in range(400)])
    top, left, height, width = columns(found, "top", "left", "height", "width")
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 200.001).all()
    assert (left + width <= 200.001).all()
    area = height * width / 200**2
    assert 0.4 < area.min() < 0.55
    assert area.max() > 0.9
    for name in ("brightness", "contrast", "saturation"):
        (factor,) = columns(found, name)
        assert 0.6 <= factor.min() < 0.62
        assert 1.38 < factor.max() <= 1.4
    (erased,) = columns(found, "erase_height")
    assert 0.6 < (erased > 0).double().mean() < 0.8
    (noise,) = columns(found, "noise")
    assert noise.min() >= 0
    assert 19 < noise.max() <= 20


def test_nothing_asked_is_nothing_done():
    assert not Augmentation()
    assert ALL
    images = torch.stack(pictures(*[(32, 32)] * 6))
    assert torch.equal(reference.augmented(images, drawn(Augmentation())), images)


@pytest.mark.parametrize(
    ("name", "value"), [("crop", 0.0), ("crop", 1.1), ("noise", -1), ("erase", 2), ("brightness", 1.5), ("erase_area", 0)]
)
def test_ranges_are_refused_with_a_sentence(name, value):
    with pytest.raises(FastidcError, match=f"--augment: {name} must be from"):
        Augmentation(**{name: value})
