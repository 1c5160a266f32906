"""What the ahead-of-time gate is told about one compilation of a kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Declares = Literal["mma", "wide_loads", "nothing"]


@dataclass(frozen=True)
class Compilation:
    """One kernel with the constants and types that one call would give it.

    ``kernel``: "module:function" of a ``@triton.jit`` function. ``signature``: argument -> Triton type ("*bf16", "i32", "fp32",
    "constexpr"), in order. ``divisible``: arguments that are multiples of 16, as torch's pointers and our strides are; without it loads
    are not vectorised and the gate would judge code that never runs. ``declares``: "mma" for a product on tensor cores, "wide_loads" for a
    memory-bound kernel (128-bit loads), "nothing" for the rest.
    """

    name: str
    kernel: str
    config: str
    """What a reader needs to tell this compilation from another one of the kernel, for example "L=50 H=12 bf16"."""
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 1
    declares: Declares = "mma"
    paper: bool = True
    arch: str | None = None
    """The one architecture whose tiles these are; None where they are the same on all."""


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
