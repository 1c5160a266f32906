"""Symmetric cosine InfoNCE, of one process or over the batches of a process group."""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist

from fastidc.ops._dispatch import Backend, Op, Spec
from fastidc.ops._info_nce_group import Gathering, shared_info_nce, start_gather, wide
from fastidc.reference import info_nce as reference

GatherGrad = Literal["full", "local"]


def info_nce(
    text: Tensor,
    pair: Tensor | Gathering,
    logit_scale: Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    gather_grad: GatherGrad = "full",
    backend: str = "auto",
) -> Tensor:
    """Mean of the text-to-pair and pair-to-text cross entropies (paper eq. 6 to 8; clip4idc.md 4).

    text, pair [B, E], row i belonging to row i, not normalised; logit_scale [], a logarithm as CLIP stores it. Returns a scalar in
    fp32 (fp64 for fp64 inputs). Statistics are taken in that precision whatever the inputs are.

    With ``group`` every rank gives its own B rows, the same number on each, scores them against all, and gets the loss over the rows of
    all of them; ``pair`` may then be what `start_gather` returned, so that it travels while the texts are encoded. Where gradients are then averaged over the ranks, as DistributedDataParallel does, ``gather_grad="full"`` makes every parameter's gradient
    that of one process with the whole batch; ``"local"`` is the official code's: the towers' gradients are divided by the number of
    ranks, logit_scale's is not.
    """
    if gather_grad not in ("full", "local"):
        raise ValueError(f'gather_grad must be "full" or "local", got {gather_grad!r}.')
    if group is not None and not isinstance(pair, Gathering):
        pair = start_gather(pair, group)
    if isinstance(pair, Gathering):
        with _no_autocast(text.device):
            return shared_info_nce(text, pair, logit_scale, gather_grad)
    run = op(Spec("info_nce", text.device.type, text.dtype, text.requires_grad), backend)
    return run(text, pair, logit_scale)


def _no_autocast(device: torch.device):
    """Autocast would multiply the normalised vectors in half precision, and a temperature of 100 makes logits of that."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def _torch(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    with _no_autocast(text.device):
        return reference.info_nce(wide(text), wide(pair), logit_scale)


op = Op("info_nce", [Backend("torch", _torch), Backend("reference", reference.info_nce)], order=lambda spec: ("torch",))
