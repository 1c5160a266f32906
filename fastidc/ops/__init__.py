"""The contract of every kernel. Each function takes ``backend`` and refuses with a sentence what it cannot serve."""

from fastidc.ops._dispatch import check_environment
from fastidc.ops._faults import raise_faults, take_faults
from fastidc.ops.attention import cross_attention, self_attention
from fastidc.ops.bert_adam import BertAdamGroup, BertAdamStep, bert_adam
from fastidc.ops.fp8_linear import fp8_linear
from fastidc.ops.info_nce import info_nce, start_gather
from fastidc.ops.layer_norm import layer_norm
from fastidc.ops.linear_cross_entropy import linear_cross_entropy
from fastidc.ops.patches import Folded, fold_normalisation, patches
from fastidc.ops.quick_gelu import quick_gelu
from fastidc.ops.squash import squash

__all__ = [
    "BertAdamGroup",
    "BertAdamStep",
    "Folded",
    "bert_adam",
    "check_environment",
    "cross_attention",
    "fold_normalisation",
    "fp8_linear",
    "info_nce",
    "layer_norm",
    "linear_cross_entropy",
    "patches",
    "quick_gelu",
    "raise_faults",
    "self_attention",
    "squash",
    "start_gather",
    "take_faults",
]
