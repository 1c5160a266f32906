"""Small data sets and caches of them, for `test_cache` and `test_cache_builds`."""

from pathlib import Path

import pytest
import worlds

from fastidc.data.cache_build import build
from fastidc.data.loaders import distinct_images
from fastidc.data.records import load_records

SPLITS = {"train": list(range(10)), "val": [20], "test": [30, 31, 32]}
COUNT = 3 * 14


def quiet(sentence):
    """Nobody listens."""


def made(data: Path, out: Path, size: int = 16, heard=quiet, **more):
    return build(images(data), data, out, size, report=heard, progress=False, **more)


def images(data: Path) -> list[Path]:
    return distinct_images(load_records(data).values())


@pytest.fixture(scope="module", name="data")
def make_data(tmp_path_factory):
    return worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", SPLITS)


@pytest.fixture(scope="module", name="file")
def make_file(data, tmp_path_factory):
    return made(data, tmp_path_factory.mktemp("cache") / "all.bin").path


@pytest.fixture(name="world")
def make_world(tmp_path):
    """A data set of one's own, to change."""
    return worlds.clevr_tree(tmp_path / "data", SPLITS)


def beside(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other.name.startswith(path.name))
