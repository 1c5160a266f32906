"""Maps over pictures: in the figure of a pair, and without matplotlib."""

import numpy as np
import pytest
import torch
import worlds
from PIL import Image

from fastidc import Description
from fastidc.describe import Maps, figure
from fastidc.describe.overlay import overlaid, upsampled


def test_a_map_grows_to_the_picture_with_its_places():
    heat = np.zeros((7, 7))
    heat[2, 5] = 1.0
    large = upsampled(heat, (140, 70))
    assert large.shape == (70, 140)
    assert large.min() == 0.0, "bicubic overshoots are cut off"
    y, x = np.unravel_index(large.argmax(), large.shape)
    assert (20 <= y < 30, 100 <= x < 120) == (True, True)
    assert np.allclose(upsampled(np.full((3, 3), 0.25), (31, 17)), 0.25, atol=1e-6)


def test_the_more_is_looked_at_the_brighter():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 0.5
    picture = Image.new("RGBA", (80, 40), (90, 90, 90, 255))
    laid = np.asarray(overlaid(picture, heat, 0.5)).astype(int)
    assert laid.shape == (40, 80, 3)
    assert laid[2, 4].sum() > laid[35, 75].sum() + 200
    assert 0 < laid[35, 75].sum() < 270, "the picture stays to be seen where nothing is looked at"
    dimmer = np.asarray(overlaid(picture, heat, 5.0)).astype(int)
    assert dimmer[2, 4].sum() < laid[2, 4].sum(), "the scale is the caller's"
    assert np.array_equal(np.asarray(overlaid(picture, heat * 0, 0.0)), np.asarray(overlaid(picture, heat * 0, 1.0)))


def test_a_figure_has_a_row_for_each_layer(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: install it")
    before, after = (worlds.noise_image(tmp_path / f"{i}.png", i, (90, 60)) for i in range(2))
    described = Description("the ball moved", (1, 2), -1.5, 0.25, None, before, after)
    maps = Maps(*(torch.full((3, 3), float(value)) for value in range(1, 7)))
    drawn = figure(described, tmp_path / "pair.png", maps=maps)
    layers = ("last intra layer", "last inter layer")
    assert [axes.get_title() for axes in drawn.axes] == [
        "before",
        "after",
        *(f"{side}, {layer}" for layer in layers for side in ("before", "after")),
    ]
    assert [len(axes.images) for axes in drawn.axes] == [1, 1, 2, 2, 2, 2]
    heats = [axes.images[1] for axes in drawn.axes[2:]]
    assert [heat.get_clim() for heat in heats] == [(0, 2.0), (0, 2.0), (0, 4.0), (0, 4.0)], "one scale for a layer"
    assert [float(heat.get_array().mean()) for heat in heats] == [1.0, 2.0, 3.0, 4.0]
    assert {heat.get_array().shape for heat in heats} == {(60, 90)}, "of the picture's own size, not the squashed one's"
    assert drawn.get_supxlabel() == "the ball moved\np(change) 0.250; log-probability -1.50"
    assert Image.open(tmp_path / "pair.png").width == 1200
