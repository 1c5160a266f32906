"""The kernels of `fastidc_kernels.patches` as registered ops, and the faults they find."""

import torch
from torch import Tensor

from fastidc.ops._dispatch import Spec
from fastidc.ops._flags import Flag
from fastidc_kernels import _runtime
from fastidc_kernels import patches as kernels

_LAST = 2**31 - 1  # a fault is _LAST - place, so that the largest names the first place and 0 none
_flag = Flag()


def unsupported(spec: Spec) -> list[str]:
    """Why the patch kernel cannot serve, in sentences. ``spec.dtype`` is the result's, ``spec.head_dim`` the bytes of a row of patches."""
    out = squash_unsupported(spec)
    if spec.dtype not in kernels.SUFFIXES:
        out.append(f"it writes bf16, fp16 and fp32, not {str(spec.dtype).removeprefix('torch.')}.")
    if spec.head_dim > kernels.LARGEST_STRIP:
        out.append(f"a row of patches, 3 * patch_size * width, may have {kernels.LARGEST_STRIP} bytes at most, not {spec.head_dim}.")
    return out


def squash_unsupported(spec: Spec) -> list[str]:
    """What holds for every kernel of CUDA C++."""
    out = []
    if missing := _runtime.missing("cupy"):
        out.append(missing)
    if spec.device != "cuda":
        out.append(f"it runs on CUDA, not on {spec.device}.")
    elif spec.arch < 80:
        out.append(f"it needs compute capability 8.0 or newer, and this device has {spec.arch / 10}.")
    return out


def patches(images: Tensor, index: Tensor, patch_size: int, augmentation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `fastidc.ops.patches`."""
    return patches_fwd(images, index, patch_size, augmentation, dtype)


def squash(pictures: list[Tensor], size: int, rows_first: list[bool]) -> Tensor:
    """See `fastidc.ops.squash`."""
    return squash_fwd(pictures, size, rows_first)


def take_faults() -> list[str]:
    """What was wrong since the last call, in sentences. Waits for the device."""
    return [
        f"The patch gather met an index that is none of its images', first at place {_LAST - raised} of its batch."
        for raised in _flag.take()
    ]


@torch.library.custom_op("fastidc::patches_fwd", mutates_args=())
def patches_fwd(images: Tensor, index: Tensor, patch_size: int, augmentation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """uint8 [I, H, W, 3], int [K], fp32 [K, 15] or None -> [K, n, 3*P*P] in ``dtype``."""
    parameters = None if augmentation is None else augmentation.contiguous()
    given = (images.contiguous(), index.long().contiguous(), parameters)
    return kernels.patches(*given, patch_size, dtype, _flag.on(images.device))


@patches_fwd.register_fake
def _(images, index, patch_size, augmentation, dtype):
    places = (images.shape[1] // patch_size) * (images.shape[2] // patch_size)
    return images.new_empty(index.shape[0], places, 3 * patch_size**2, dtype=dtype)


@torch.library.custom_op("fastidc::squash_fwd", mutates_args=())
def squash_fwd(pictures: list[Tensor], size: int, rows_first: list[bool]) -> Tensor:
    """uint8 [H, W, 3] each -> uint8 [K, size, size, 3]."""
    return kernels.squash(pictures, size, rows_first)


@squash_fwd.register_fake
def _(pictures, size, rows_first):
    return pictures[0].new_empty(len(pictures), size, size, 3)
