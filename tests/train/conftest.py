"""Small data sets and a small CLIP for whole runs."""

import functools

import pytest
import runs
import worlds

from fastidc.data.render import RenderConfig, render_dataset
from fastidc.evaluate import captions
from fastidc.evaluate.captions import CaptionScorer
from fastidc.train import judge


@pytest.fixture(scope="session")
def clevr(tmp_path_factory):
    """CLEVR-Change as `fastidc render` makes it."""
    out = tmp_path_factory.mktemp("rendered") / "data"
    render_dataset(RenderConfig(scenes=40, width=96, height=64, jitter=0.2, min_objects=3, max_objects=4, seed=1, references=2), out)
    return out


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return worlds.clip_file(tmp_path_factory.mktemp("clip") / "ViT-small.pt")


@pytest.fixture
def no_meteor(monkeypatch):
    """METEOR's process takes seconds to start; one test has it."""
    monkeypatch.setattr("fastidc.evaluate.background.CaptionScorer", functools.partial(CaptionScorer, meteor=False))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The data and the model that `runs` trains in seconds."""
    return runs.world(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def runs_without_java(monkeypatch):
    """`runs.without_java`, for one test."""
    for module, name in ((judge, "score_by_subset"), (captions, "tokenize")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    runs.without_java()
