"""Symmetric cosine InfoNCE."""

from torch import Tensor

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.reference import info_nce as reference


def info_nce(text: Tensor, pair: Tensor, logit_scale: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean of the text-to-pair and pair-to-text cross entropies (paper eq. 6 to 8; clip4idc.md 4).

    text, pair [B, E], row i belonging to row i, not normalised; logit_scale [], a logarithm as CLIP stores it. Returns a scalar in
    fp32 (fp64 for fp64 inputs). Statistics are taken in that precision whatever the inputs are.
    """
    run = op(lambda: Spec("info_nce", text.device.type, text.dtype, text.requires_grad), backend)
    return run(text, pair, logit_scale)


def _torch(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    if text.dtype.itemsize < 4:
        text, pair = text.float(), pair.float()
    return reference.info_nce(text, pair, logit_scale)


op = Op("info_nce", [Backend("torch", _torch), Backend("reference", reference.info_nce)], order=lambda spec: ("torch",))
