"""Shared fixtures. The interpreter is chosen before anything can import a kernel, and only where there is no GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))


# Whole runs, whose files have few tests and take longest: begun last, they would leave the other processes with nothing to do.
_LONG = (
    "test_demo.py",
    "test_resume_exact.py",
    "test_interruptions.py",
    "test_whole_step.py",
    "test_precision.py",
    "test_compiled.py",
    "test_peers.py",
    "test_triton.py",
    "test_processes.py",
    "test_cli.py",
    "test_drop_in.py",
    "test_own_pairs.py",
    "test_contrast.py",
    "test_caption_scores.py",
)


def _hide_java(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "")
    patch.delenv("JAVA_HOME", raising=False)


@pytest.fixture
def no_java(monkeypatch):
    _hide_java(monkeypatch)


@pytest.fixture(scope="module")
def module_without_java():
    """METEOR has tests of its own, and its process takes longer to start than a run of a few steps takes."""
    with pytest.MonkeyPatch.context() as patch:
        _hide_java(patch)
        yield


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` where there is one")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
