"""The only door to Triton and CuPy: what is there and, where something is not, why not in words."""

import functools
import importlib.util


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
