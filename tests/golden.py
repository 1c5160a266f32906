"""The official code's outputs, which lie beside a checkout and are never committed."""

import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"adapt": ("adapt_small", "adapt_patch16"), "caption": ("caption_small", "caption_patch16")}


def folder() -> Path:
    return Path(os.environ.get("FASTIDC_TEST_GOLDEN", ROOT.parent / "shared" / "golden"))


def annotation_files() -> Path:
    """Real annotation files, tests only; skips where they are absent."""
    path = Path(os.environ.get("FASTIDC_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real annotation files are absent; set FASTIDC_TEST_DATA to their folder ({path} does not exist)")
    return path


class Golden:
    """One golden file: its configuration, its weights rebuilt, its tensors, its images [B, 2, 3, H, W]."""

    def __init__(self, name: str):
        base = folder() / name
        if not base.with_suffix(".json").is_file():
            pytest.skip(f"goldens of the official code are absent; set FASTIDC_TEST_GOLDEN to their folder ({folder()} has no {name}.json)")
        self.meta = json.loads(base.with_suffix(".json").read_text())
        self.tensors = load_file(base.with_suffix(".safetensors"))
        spec = importlib.util.spec_from_file_location("golden_weights", folder() / "golden_weights.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.weights: dict[str, Tensor] = module.state_dict(self.meta)
        size, batch = self.meta["config"]["image_size"], len(self.tensors["input_ids"])
        rng = np.random.RandomState(self.meta["seed"])
        self.images = torch.from_numpy(rng.standard_normal((batch, 2, 3, size, size)).astype(np.float32))
        self.intra_layers = self.meta["config"]["intra_layers"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    @property
    def grad_norms(self) -> dict[str, float]:
        return {k.removeprefix("grad_norm/"): float(v) for k, v in self.tensors.items() if k.startswith("grad_norm/")}

    @property
    def after(self) -> dict[str, Tensor]:
        return {k.removeprefix("train/after/"): v for k, v in self.tensors.items() if k.startswith("train/after/")}


@lru_cache(maxsize=1)
def load(name: str) -> Golden:
    return Golden(name)
