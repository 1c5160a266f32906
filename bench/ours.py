"""fastidc's own variants: every backend of an op as `fastidc.ops` knows them, so that a new one appears here by itself."""

from collections.abc import Callable
from typing import Any

import torch

from bench.case import Case, Variant


def variants_of(
    op: str,
    build: Callable[[Case, str], Callable],
    spec: Callable[[Case], dict[str, Any]] = lambda case: {},
    refuse=lambda case, backend: [],
) -> list[Variant]:
    """One variant a backend of ``op``. build(case, backend) gives the callable; spec(case) what `_dispatch.Spec` holds beyond op, device,
    dtype and grad; refuse(case, backend) may add sentences of the bench's own."""
    import fastidc.ops  # noqa: F401 - its modules enter their ops into OPS
    from fastidc.ops import _dispatch

    def variant(name: str, backend: "_dispatch.Backend") -> Variant:
        def unsupported(case: Case) -> list[str]:
            arch = _dispatch.arch_of(torch.device(case.device))
            facts = _dispatch.Spec(op, case.device, case.dtype, bool(case.gradients), arch, **spec(case))
            specification = name == "reference" and case.device == "cuda" and case.dtype.itemsize < 4
            own = ["it is the specification, which nobody runs in half precision on a GPU."] if specification else []
            return [*own, *backend.unsupported(facts), *refuse(case, name)]

        return Variant(f"fastidc:{name}", lambda case: build(case, name), unsupported, ours=True)

    return [variant(name, backend) for name, backend in _dispatch.OPS[op].backends.items()]
