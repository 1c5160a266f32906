"""What every Triton backend refuses alike, and how it wants its rows."""

import torch

from fastidc.ops._dispatch import Spec
from fastidc_kernels import _runtime

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def refusals(spec: Spec) -> list[str]:
    """Why no kernel can serve on this device in this dtype, in sentences."""
    if missing := _runtime.missing("triton"):
        return [missing]
    out = []
    interpreted = spec.device != "meta" and _runtime.interpreted()
    if spec.device == "cpu" and not interpreted:
        out.append(
            "it runs on CUDA, and on a CPU only in Triton's interpreter, where TRITON_INTERPRET=1 was set before anything was imported."
        )
    elif spec.device == "cuda" and interpreted:
        out.append("Triton's interpreter is on, which computes on the CPU; unset TRITON_INTERPRET.")
    elif spec.device == "cuda" and spec.arch < 80:
        out.append(f"it needs compute capability 8.0 or newer, and this device has {spec.arch / 10}.")
    elif spec.device not in ("cpu", "cuda", "meta"):
        out.append(f"it runs on CUDA, not on {spec.device}.")
    if spec.dtype not in _NAMES or (spec.dtype == torch.float64 and not interpreted):
        out.append(f"it takes fp32, fp16 and bf16, not {_NAMES.get(spec.dtype, spec.dtype)}.")
    if spec.dtype == torch.bfloat16 and interpreted:
        out.append("Triton's interpreter multiplies bf16 matrices wrongly; take fp16 or fp32.")
    return out


def readable(x: torch.Tensor) -> torch.Tensor:
    """x with its numbers of a row side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
