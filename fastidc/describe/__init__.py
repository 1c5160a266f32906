"""A trained model in everyday use: captions of pairs, the probability that anything changed, and search.

The package itself can be called: ``fastidc.describe(before, after, model=...)`` is `fastidc.describe.describer.describe`, because the public
name of the function is that of this room.
"""

import sys
import types

from fastidc.describe.attention_maps import Maps, attention_maps
from fastidc.describe.describer import Describer, describe
from fastidc.describe.description import Description
from fastidc.describe.drawing import figure
from fastidc.describe.loading import default_model
from fastidc.describe.no_change import (
    NO_CHANGE_FILE,
    NoChange,
    change_probabilities,
    fit_change_probability,
    no_change_sentences,
    write_change_probabilities,
    write_no_change,
)
from fastidc.describe.search import embed_pairs, embed_texts, rank

__all__ = [
    "NO_CHANGE_FILE",
    "Describer",
    "Description",
    "Maps",
    "NoChange",
    "attention_maps",
    "change_probabilities",
    "default_model",
    "describe",
    "embed_pairs",
    "embed_texts",
    "figure",
    "fit_change_probability",
    "no_change_sentences",
    "rank",
    "write_change_probabilities",
    "write_no_change",
]


class _Room(types.ModuleType):
    def __call__(self, *args, **kwargs) -> Description:
        return describe(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
