"""fastidc: CLIP for image difference captioning, fast and faithful (CLIP4IDC, arXiv 2206.00629).

The public names load on first use, so that ``import fastidc`` costs nothing and starts nothing.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "CLIP4IDC": "fastidc.model.clip4idc",
    "Describer": "fastidc.describe.describer",
    "Description": "fastidc.describe.description",
    "FastidcError": "fastidc.errors",
    "ModelConfig": "fastidc.config",
    "PackedText": "fastidc.packed",
    "PairBatch": "fastidc.data.loaders",
    "PairRecord": "fastidc.data.records",
    "Tokenizer": "fastidc.tokenizer",
    "describe": "fastidc.describe",
    "embed_pairs": "fastidc.describe.search",
    "embed_texts": "fastidc.describe.search",
    "ops": "fastidc.ops",
    "rank": "fastidc.describe.search",
}
__all__ = [
    "CLIP4IDC",
    "Describer",
    "Description",
    "FastidcError",
    "ModelConfig",
    "PackedText",
    "PairBatch",
    "PairRecord",
    "Tokenizer",
    "describe",
    "embed_pairs",
    "embed_texts",
    "ops",
    "rank",
]

if TYPE_CHECKING:
    from fastidc import describe, ops
    from fastidc.config import ModelConfig
    from fastidc.data.loaders import PairBatch
    from fastidc.data.records import PairRecord
    from fastidc.describe.describer import Describer
    from fastidc.describe.description import Description
    from fastidc.describe.search import embed_pairs, embed_texts, rank
    from fastidc.errors import FastidcError
    from fastidc.model.clip4idc import CLIP4IDC
    from fastidc.packed import PackedText
    from fastidc.tokenizer import Tokenizer


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastidc' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name in ("describe", "ops") else getattr(module, name)
