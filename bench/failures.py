"""A variant may fail in any way; the others are to be measured, and its row says what happened."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from bench.case import CRASHED, MISSING, Case, MissingError, Row


class DeviceLostError(Exception):
    """After a fault on the device nothing more can run in this process. ``variant``: whose call it was; ``rows``: what there is of the case."""

    def __init__(self, sentence: str, variant: str):
        super().__init__(sentence)
        self.variant = variant
        self.rows: list[Row] = []


def out_of_memory(error: BaseException) -> bool:
    """Also where a library could not get its workspace, which it says in words of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def sentence(error: BaseException) -> str:
    """The first line of an error, as a short sentence."""
    if out_of_memory(error):
        return "it ran out of memory."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:240]
    return text if text.endswith(".") else text + "."


def guarded(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or (status, sentence) where it raised."""
    try:
        return call()
    except MissingError as error:
        return MISSING, str(error)
    except ImportError as error:
        return MISSING, f"it cannot be imported ({sentence(error)})"
    except Exception as error:  # a peer may fail in any way, and the others are to be measured
        result = CRASHED, sentence(error)
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after an illegal access this fails too, and `check_device` says so
            torch.cuda.empty_cache()
    return result


def check_device(case: Case, variant: str) -> None:
    """After an illegal access every later call fails too; better one clear end than a table of its echoes."""
    if case.device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        what = f"{variant} left the device unusable at {case.family} {case.name} ({sentence(error)}); leave it out with --skip."
        raise DeviceLostError(what, variant) from error
