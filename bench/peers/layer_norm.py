"""Residual + LayerNorm as its users run it: an add and F.layer_norm, eager and compiled; Liger-Kernel's where there is no residual."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, Variant

EPS = 1e-5


def variants() -> list[Variant]:
    return [
        Variant("add + F.layer_norm", lambda case: add_and_norm),
        Variant("add + F.layer_norm compiled", lambda case: torch.compile(add_and_norm, dynamic=False), compiled=True),
        Variant("Liger-Kernel", _liger, _liger_refuses, needs=("liger_kernel",)),
    ]


def add_and_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None):
    """One kernel for the sum and one for the norm, which takes statistics in fp32 by itself."""
    s = x if residual is None else x + residual
    normalised = F.layer_norm(s, weight.shape, weight.to(s.dtype), bias.to(s.dtype), EPS)
    return normalised if residual is None else (normalised, s)


def _liger_refuses(case: Case) -> list[str]:
    sentences = [] if case.device == "cuda" else ["it runs on CUDA only."]
    return sentences + (["its LayerNorm adds no residual."] if case.shape["residual"] else [])


def _liger(case: Case) -> Callable[..., Tensor]:
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)
