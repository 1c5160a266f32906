"""Symmetric cosine InfoNCE, of one process or over the batches of a process group."""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist

from fastidc.ops import _info_nce_triton as triton_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of
from fastidc.ops._info_nce_faults import faults_of, note_faults
from fastidc.ops._info_nce_group import BLOCKS, Gathering, shared_info_nce, start_gather, wide
from fastidc.reference import info_nce as reference

GatherGrad = Literal["full", "local"]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    all of them; ``pair`` may then be what `start_gather` returned, so that it travels while the texts are encoded. Where gradients are
    then averaged over the ranks, as DistributedDataParallel does, ``gather_grad="full"`` makes every parameter's gradient that of one
    process with the whole batch; ``"local"`` is the official code's: the towers' gradients are divided by the number of ranks,
    logit_scale's is not. Gradients of gradients there are of neither a group nor the kernels.
    """
    if gather_grad not in ("full", "local"):
        raise ValueError(f'gather_grad must be "full" or "local", got {gather_grad!r}.')
    if isinstance(pair, Gathering) and group not in (None, pair.group):
        raise ValueError("pair was gathered over another group than the one given.")
    own = pair.own if isinstance(pair, Gathering) else pair
    _check(text, own, logit_scale)
    grad = torch.is_grad_enabled() and (text.requires_grad or own.requires_grad or logit_scale.requires_grad)
    spec = Spec("info_nce", text.device.type, text.dtype, grad, arch_of(text.device), head_dim=text.shape[1])
    if own is pair and group is None:
        return op(spec, backend)(text, pair, logit_scale)
    name = op.serving(spec, backend)
    if name not in BLOCKS:
        raise ValueError(f"backend {name!r} of info_nce is for one process; over a group choose one of auto, {', '.join(BLOCKS)}.")
    gathering = start_gather(pair, group) if own is pair else pair
    with _no_autocast(text.device):
        return shared_info_nce(text, gathering, logit_scale, gather_grad, BLOCKS[name])


def _check(text: Tensor, pair: Tensor, logit_scale: Tensor) -> None:
    for name, given in (("text", text), ("pair", pair), ("logit_scale", logit_scale)):
        if not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a tensor, got {given!r:.80}.")
    if text.dim() != 2 or text.shape != pair.shape or not text.numel():
        raise ValueError(f"text and pair must both be [B, E], B and E at least 1, got {list(text.shape)} and {list(pair.shape)}.")
    if text.dtype != pair.dtype or text.device != pair.device or text.dtype not in _DTYPES:
        raise ValueError(
            f"text and pair must have one dtype, of fp16, bf16, fp32 and fp64, and one device, got {text.dtype} on {text.device} and {pair.dtype} on "
            f"{pair.device}."
        )
    if logit_scale.dim() or not logit_scale.is_floating_point() or logit_scale.device != text.device:
        raise ValueError(
            f"logit_scale must be one floating-point number, shape [], on {text.device}, got {logit_scale.dtype} {list(logit_scale.shape)} on "
            f"{logit_scale.device}."
        )


def _no_autocast(device: torch.device):
    """Autocast would multiply the normalised vectors in half precision, and a temperature of 100 makes logits of that."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def _torch(text: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    if text.device.type != "meta":
        note_faults(text, pair, faults_of(text.device))
    with _no_autocast(text.device):
        return reference.info_nce(wide(text), wide(pair), logit_scale)


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: in half precision the kernels go first, 5 products of which none leaves the chip against 6 and the traffic
    of B x B matrices, and a handful of launches at small B. In fp32 they have no tensor cores, and torch's products go first."""
    half = spec.device == "cuda" and spec.dtype in (torch.float16, torch.bfloat16)
    return ("triton", "torch") if half else ("torch", "triton")


op = Op(
    "info_nce",
    [
        Backend("triton", triton_backend.info_nce, triton_backend.unsupported),
        Backend("torch", _torch),
        Backend("reference", reference.info_nce),
    ],
    order=_order,
)
