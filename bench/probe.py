"""The largest batch that fits a device, found by trying."""

from collections.abc import Callable

from bench.failures import out_of_memory

FINENESS = 8  # the answer is within an eighth of the truth


def largest(step: Callable[[int], object], cap: int) -> int:
    """The largest size up to ``cap`` for which ``step(size)`` does not run out of memory: doubled from 1 until it does, then halving the gap;
    0 where not even 1 fits. Whatever else ``step`` raises is raised."""
    fits, fails = 0, cap + 1
    trial = 1
    while trial <= cap and fails > cap:
        if _runs(step, trial):
            fits, trial = trial, 2 * trial
        else:
            fails = trial
    while fails <= cap and fails - fits > max(1, fits // FINENESS):
        trial = (fits + fails) // 2
        if _runs(step, trial):
            fits = trial
        else:
            fails = trial
    return fits


def _runs(step: Callable[[int], object], size: int) -> bool:
    try:
        step(size)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    return True
