"""The contrastive loss as its users run it: open_clip's `ClipLoss` itself, and its operations restated for where open_clip is absent.

ClipLoss takes normalised features and a scale, not its logarithm; normalising is part of every model that calls it, and of the timing.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, Variant


def variants() -> list[Variant]:
    return [
        Variant("open_clip ClipLoss", lambda case: _clip_loss(), needs=("open_clip",)),
        Variant(
            "open_clip ClipLoss compiled", lambda case: torch.compile(_clip_loss(), dynamic=False), needs=("open_clip",), compiled=True
        ),
        Variant("open_clip order", lambda case: _two_products),
        Variant("open_clip order compiled", lambda case: torch.compile(_two_products, dynamic=False), compiled=True),
        Variant("cut-cross-entropy both ways", _cce, _half_on_cuda, needs=("cut_cross_entropy",)),
        Variant("Inf-CL both ways", _inf_cl, _whole_heads, needs=("inf_cl",)),
    ]


def _on_cuda(case: Case) -> list[str]:
    return [] if case.device == "cuda" else ["it runs on CUDA only."]


def _whole_heads(case: Case) -> list[str]:
    width = case.shape["width"]
    return [*_on_cuda(case), *([] if width % 256 == 0 else [f"it takes embeddings in heads of 256 numbers, and {width} is no multiple."])]


def _half_on_cuda(case: Case) -> list[str]:
    if refusals := _on_cuda(case):
        return refusals
    return [] if case.dtype in (torch.float16, torch.bfloat16) else ["it takes fp16 and bf16 only."]


def _clip_loss() -> Callable[..., Tensor]:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()

    def run(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
        return loss(F.normalize(pair, dim=-1), F.normalize(text, dim=-1), logit_scale.exp())

    return run


def _two_products(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """Both B x B products, scaled and then multiplied, and a cross entropy over each, as open_clip does in one process."""
    text, pair = F.normalize(text, dim=-1), F.normalize(pair, dim=-1)
    labels, scale = torch.arange(len(text), device=text.device), logit_scale.exp()
    scores = (scale * pair @ text.T, scale * text @ pair.T)
    return sum(F.cross_entropy(x, labels) for x in scores) / 2


def _cce(case: Case) -> Callable[..., Tensor]:
    """Row direction twice, with the scale folded into the rows, as its README proposes for CLIP."""
    from cut_cross_entropy import linear_cross_entropy

    def run(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
        text, pair = F.normalize(text, dim=-1), F.normalize(pair, dim=-1)
        labels, scale = torch.arange(len(text), device=text.device), logit_scale.exp().to(text.dtype)
        return (linear_cross_entropy(scale * text, pair, labels) + linear_cross_entropy(scale * pair, text, labels)) / 2

    return run


def _inf_cl(case: Case) -> Callable[..., Tensor]:
    """Row direction twice, as its README calls it; it normalises nothing, and multiplies in TF32 whatever it is given."""
    from inf_cl import cal_flash_loss

    def run(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
        text, pair, scale = F.normalize(text.float(), dim=-1), F.normalize(pair.float(), dim=-1), logit_scale.exp()
        return (cal_flash_loss(text, pair, scale=scale).mean() + cal_flash_loss(pair, text, scale=scale).mean()) / 2

    return run
