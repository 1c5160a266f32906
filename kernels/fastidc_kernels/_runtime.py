"""The only door to Triton and CuPy: what is there and, where something is not, why not in words."""

import functools
import importlib.util
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def missing(package: str) -> str | None:
    """None where ``package`` ("triton", "cupy") can be found, else a sentence. Finds it without importing it: no device is touched."""
    try:
        found = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    return None if found else f"the package {package} is not installed."


@functools.cache
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter. It was decided by TRITON_INTERPRET when the first of them was imported."""
    if missing("triton"):
        return False
    from triton.runtime.interpreter import InterpretedFunction

    from fastidc_kernels import attention

    return isinstance(attention.attention_fwd_kernel, InterpretedFunction)


def cuda_module(**source):
    """``cupy.RawModule(**source)``: what is compiled or loaded, at its first use."""
    import cupy

    return cupy.RawModule(**source)


def on_torch_stream(device: "torch.device") -> AbstractContextManager:
    """Within it CuPy launches on torch's current stream of ``device``, also while that is being captured."""
    import cupy
    import torch

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy 13
