"""Linear + cross entropy as its users run it: PyTorch eager and compiled, torch's own fused op, Liger-Kernel, cut-cross-entropy, QuACK."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, MissingError, Variant
from fastidc.config import PAD_ID

HALF = (torch.float16, torch.bfloat16)


def variants() -> list[Variant]:
    return [
        Variant("F.linear + F.cross_entropy", lambda case: _separate),
        Variant("F.linear + F.cross_entropy compiled", lambda case: torch.compile(_separate, dynamic=False), compiled=True),
        Variant("F.linear_cross_entropy", _native),
        Variant("F.linear_cross_entropy chunked", _native_chunked),
        Variant("Liger-Kernel", _liger, _cuda, needs=("liger_kernel",)),
        Variant("cut-cross-entropy", _cce, lambda case: _half(case) + _no_bias(case), needs=("cut_cross_entropy",)),
        Variant("QuACK", _quack, lambda case: _half(case) + _no_bias(case), needs=("quack",)),
    ]


def _cuda(case: Case) -> list[str]:
    return [] if case.device == "cuda" else ["it runs on CUDA only."]


def _half(case: Case) -> list[str]:
    return _cuda(case) + ([] if case.dtype in HALF else ["it takes fp16 and bf16 only."])


def _no_bias(case: Case) -> list[str]:
    return ["it takes no bias, which the captioner's head has."] if case.shape["bias"] else []


def _separate(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """As the captioning codes write it: all logits, in fp32 for the loss."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets, ignore_index=PAD_ID)


def _native(case: Case) -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError(f"torch {torch.__version__} has no F.linear_cross_entropy.")
    return lambda x, weight, bias, targets: F.linear_cross_entropy(x, weight, targets, linear_bias=bias, ignore_index=PAD_ID)


def _native_chunked(case: Case) -> Callable[..., Tensor]:
    """torch's own path without all logits at once."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise MissingError(f"torch {torch.__version__} has no LinearCrossEntropyOptions.")

    def run(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it warns where it falls back, and that would be the row above under another name
            return F.linear_cross_entropy(x, weight, targets, linear_bias=bias, ignore_index=PAD_ID, options=options())

    return run


def _liger(case: Case) -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=PAD_ID)
    biased = case.shape["bias"]
    return lambda x, weight, bias, targets: loss(weight, x, targets, bias if biased else None)


def _cce(case: Case) -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight, bias, targets: linear_cross_entropy(x, weight, targets, ignore_index=PAD_ID)


def _quack(case: Case) -> Callable[..., Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, weight, bias, targets: chunked_linear_cross_entropy(x, weight, targets, ignore_index=PAD_ID)
