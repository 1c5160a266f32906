"""What Triton launchers do the same."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch


@functools.cache
def arch(device: torch.device) -> int:
    """Ten times the compute capability; Hopper's in the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def options(tile) -> dict:
    """How to compile ``tile``, one of `_tiles`. Fused multiply-adds are asked for, because Triton's default for them changes between versions."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def statistic(dtype: torch.dtype) -> torch.dtype:
    """In what sums over numbers of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
