"""A description on a page and as a picture."""

import base64
import dataclasses
import io
import re
import sys

import numpy as np
import pytest
import torch
import worlds
from PIL import Image

from fastidc import Description, FastidcError
from fastidc.describe import figure
from fastidc.describe.drawing import check_format


@pytest.fixture
def described(tmp_path):
    before, after = (worlds.noise_image(tmp_path / f"{name}.png", seed, (900, 300)) for seed, name in enumerate(("a<b>&", "after")))
    return Description('the <b>red</b> ball & "$x$" moved', (1, 2), -1.5, 0.25, None, before, after)


def test_page_escapes_what_it_shows(described):
    page = described._repr_html_()
    assert "the &lt;b&gt;red&lt;/b&gt; ball &amp; &quot;$x$&quot; moved" in page
    assert "a&lt;b&gt;&amp;.png" in page
    assert "<b>" not in page
    assert "p(change) 0.250; log-probability -1.50" in page
    assert not re.search(r"(?<!-)color:\s*(?!inherit)|background:\s*(?!transparent)", page), "the page's own colours, light or dark"


def test_page_holds_both_images_small(described):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', described._repr_html_())
    assert len(found) == 2
    for data, path in zip(found, (described.before, described.after), strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert shown.size == (320, 107)
        expected = Image.open(path)
        expected.thumbnail((320, 320))
        assert np.array_equal(np.asarray(shown), np.asarray(expected))


def test_page_of_arrays_and_of_images_that_have_gone(described):
    arrays = dataclasses.replace(described, before=np.zeros((4, 5, 3), np.uint8), after=torch.zeros(3, 4, 5, dtype=torch.uint8))
    assert arrays._repr_html_().count("data:image/png") == 2
    described.before.unlink()
    page = described._repr_html_()
    assert page.count("data:image/png") == 1
    assert "cannot be shown" in page
    assert "<b>" not in page
    assert "moved" in page


def test_page_tells_why_there_is_no_probability(described):
    page = dataclasses.replace(described, p_change=None, p_change_reason="<run> has none")._repr_html_()
    assert "p(change) unknown: &lt;run&gt; has none" in page


def test_figure_shows_pair_and_caption(described, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: install it")
    drawn = figure(described, tmp_path / "sub" / "pair.png")
    assert [axes.get_title() for axes in drawn.axes] == ["before", "after"]
    assert [len(axes.images) for axes in drawn.axes] == [1, 1]
    assert np.array_equal(drawn.axes[1].images[0].get_array(), np.asarray(Image.open(described.after)))
    assert Image.open(tmp_path / "sub" / "pair.png").width == 1200, "a caption with dollars is no formula"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["pair.png"]
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_figure_lays_maps_over_the_images(described):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: install it")
    drawn = figure(described, maps=(torch.rand(7, 7), None))
    assert [len(axes.images) for axes in drawn.axes] == [2, 1]
    picture, heat = drawn.axes[0].images
    assert tuple(heat.get_extent()) == tuple(picture.get_extent()) == (-0.5, 899.5, 299.5, -0.5)
    both = figure(described, maps=(np.full((7, 7), 2.0), np.full((2, 2), 8.0)))
    assert {axes.images[1].get_clim() for axes in both.axes} == {(0, 8.0)}, "one scale for both"


def test_figure_that_cannot_be_made_is_a_sentence(described, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: install it")
    with pytest.raises(FastidcError, match=r"pair\.docx.*png"):
        figure(described, tmp_path / "pair.docx")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FastidcError, match=r"folder\.png cannot be written"):
        figure(described, tmp_path / "folder.png")
    described.after.unlink()
    with pytest.raises(FastidcError, match=r"the after-image has gone: .*after\.png: no such image\."):
        figure(described)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for ask in (lambda: figure(described), lambda: check_format("x.png")):
        with pytest.raises(FastidcError, match="pip install matplotlib"):
            ask()
