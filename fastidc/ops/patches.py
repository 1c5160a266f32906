"""Stored images as the rows that the patch embedding multiplies, and normalisation as part of that product."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastidc.ops import _patches_cuda as cuda_backend
from fastidc.ops._dispatch import Backend, Op, Spec, arch_of
from fastidc.reference import patches as reference

COLUMNS = reference.COLUMNS


def patches(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    *,
    augmentation: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """Images by index, cut into patches: values 0 to 255, which every floating dtype holds exactly. Of them there is no gradient.

    images uint8 [I, H, W, 3], H and W multiples of ``patch_size``; index int32 or int64 [K] on their device, any number of times each, or None
    for all images once, in order -> [K, n, 3*P*P] in ``dtype``, patches row by row, each in the order (channel, row, column) of a patch embedding's ``weight.flatten(1)``.
    augmentation: fp32 [K, 15] on their device, `COLUMNS` for each image (`fastidc.data.augment` draws them), or None.

    ValueError, in sentences, for tensors that do not fit and where ``backend`` cannot serve. An index outside of the images is a ValueError on
    a CPU; the kernel gives zeros for it and raises a flag that `fastidc.ops.take_faults` reads.
    """
    _check(images, index, patch_size, augmentation, dtype)
    if index is None:
        index = torch.arange(len(images), device=images.device)
    spec = Spec("patches", images.device.type, dtype, False, arch_of(images.device), head_dim=3 * patch_size * images.shape[2])
    return op(spec, backend)(images, index, patch_size, augmentation, dtype)


class Folded(NamedTuple):
    """See `fold_normalisation`."""

    weight: Tensor
    bias: Tensor
    remainder: Tensor


def fold_normalisation(
    weight: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype | None = None
) -> Folded:
    """The projection of (x / 255 - mean) / std by ``weight``, as ``F.linear(patches(...), folded.weight, folded.bias) + folded.remainder``.

    weight [C, 3, P, P], mean and std of the three channels (numbers, or tensors of three on weight's device) -> [C, 3*P*P] and [C] in ``dtype``
    (weight's, unless given), and [C] in float32, float64 for float64. The bias is of the weights as they were rounded, so that
    their roundings meet x - 255 mean, as those of plain weights do, and not x. The remainder is what rounding took from the bias, 2^-9 of it in
    bf16: it would be wrong alike in every patch, and costs nothing where it is added to the positions. All three have gradients. Not for fp16:
    divided by 255 std, most weights of a stem fall below its least normal number.
    """
    if weight.dim() != 4 or weight.shape[1] != 3 or len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"weight must be [C, 3, P, P] and mean and std of 3 channels, got {list(weight.shape)}, {len(mean)} and {len(std)}."
        )
    dtype = dtype or weight.dtype
    if dtype == torch.float16:
        raise ValueError("dtype must be one that holds small numbers, got torch.float16; normalise the patches instead.")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    exact = torch.float64 if dtype.itemsize > 2 else torch.float32
    mean = torch.as_tensor(mean, dtype=exact, device=weight.device).flatten()
    std = torch.as_tensor(std, dtype=wide, device=weight.device).view(3, 1, 1)
    folded = (weight / (255 * std)).to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        bias = -(folded.sum((2, 3), dtype=exact) @ (255 * mean))
    rounded = bias.to(dtype)
    return Folded(folded.flatten(1), rounded, (bias - rounded).to(torch.float64 if dtype == torch.float64 else torch.float32))


def _check(images: Tensor, index: Tensor | None, patch_size: int, augmentation: Tensor | None, dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [I, H, W, 3], got {images.dtype} {list(images.shape)}.")
    if patch_size < 1 or images.shape[1] % patch_size or images.shape[2] % patch_size or not images.shape[1] or not images.shape[2]:
        raise ValueError(f"images must be a whole number of patches of {patch_size}, got {images.shape[1]} x {images.shape[2]} pixels.")
    if index is not None and (index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or index.device != images.device):
        raise ValueError(
            f"index must be int32 or int64 [K] on {images.device}, where the images are, got {index.dtype} {list(index.shape)} on {index.device}."
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one, got {dtype}.")
    if augmentation is None:
        return
    right = augmentation.dtype == torch.float32 and augmentation.device == images.device
    count = len(images if index is None else index)
    if not right or augmentation.shape != (count, len(COLUMNS)):
        raise ValueError(
            f"augmentation must be float32 [{count}, {len(COLUMNS)}] on {images.device}, got {augmentation.dtype} "
            f"{list(augmentation.shape)} on {augmentation.device}."
        )


def _checked(index: Tensor, stored: int) -> None:
    """ValueError where the host can see an index that is none."""
    if index.device.type != "cpu" or type(index) is not Tensor or torch.compiler.is_compiling():
        return
    wrong = (index < 0) | (index >= stored)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"index must be from 0 to {stored - 1}, got {int(index[place])} at place {place}.")


def _reference(images: Tensor, index: Tensor, patch_size: int, augmentation: Tensor | None, dtype: torch.dtype) -> Tensor:
    _checked(index, len(images))
    return reference.patches(images, index, patch_size, augmentation, dtype)


def _torch(images: Tensor, index: Tensor, patch_size: int, augmentation: Tensor | None, dtype: torch.dtype) -> Tensor:
    _checked(index, len(images))
    picked = images.index_select(0, index)
    if augmentation is not None:
        picked = reference.augmented(picked, augmentation)
    picked = picked.to(dtype)  # first: bytes are slow to move about one by one
    picked = picked.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # [K, rows, P, columns, P, 3]
    return picked.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def _order(spec: Spec) -> tuple[str, ...]:
    """Not measured on a GPU yet: on CUDA the kernel goes first, one pass over memory where torch has a gather, a transposition and a cast."""
    return ("cuda", "torch") if spec.device == "cuda" else ("torch",)


op = Op(
    "patches",
    [Backend("cuda", cuda_backend.patches, cuda_backend.unsupported), Backend("torch", _torch), Backend("reference", _reference)],
    order=_order,
)
