"""torch.compile around the captioner: whether, why, for which lengths, and what a user sees of it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC

Choice = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Policy:
    """Whether the captioner is compiled, and the reason as a clause."""

    compiled: bool
    why: str


def policy(choice: Choice, stage: str, device: str, fsdp: bool) -> Policy:
    """What ``--compile`` means for a run; FastidcError where "on" cannot be.

    "auto" compiles captioning on CUDA, where a small batch's step waits for launches and a large one's for memory: compiled, the element-wise
    work between two products is one kernel. Not measured on a GPU yet. On a CPU a step waits for neither, and the compiler takes minutes first;
    that was not measured against the steps of a long run.
    """
    if choice not in ("auto", "on", "off"):
        raise FastidcError(f"unknown --compile {choice!r}; choose one of auto, on, off.")
    if choice == "off":
        return Policy(False, "as asked for")
    if stage == "adapt":
        return Policy(False, "adaptation has no captioner")
    if fsdp:
        if choice == "on":
            raise FastidcError(
                "--compile on does not go with --fsdp, whose gathers between the layers break the graph; leave one of them out."
            )
        return Policy(False, "--fsdp gathers parameters between the layers, which breaks the graph")
    if choice == "auto" and device != "cuda":
        return Policy(False, f"on {device} there are no launches to save, and the compiler takes minutes")
    return Policy(True, "as asked for" if choice == "on" else "a step has a fraction of the launches")


def bucket(length: int, longest: int) -> int:
    """The length that captions of ``length`` tokens are padded to where shapes are static: few of them, so that few graphs are made."""
    for size in (8, 16, 24, 32, 48, 64):
        if length <= size < longest:
            return size
    return longest


def compile_captioner(model: CLIP4IDC, *, backend: str = "inductor") -> None:
    """Has encoder, decoder and head of ``model``'s captioner compiled, one graph for each of `bucket`'s lengths, each when it first comes up;
    FastidcError comes up there too where the compiler fails. Pads follow the end token, so no row with a target sees one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # one user's graphs for all of his runs; torch's own default, which it writes there when it is first asked, is a temporary folder
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastidc" / "inductor"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)
    dynamo = torch._dynamo.config  # a graph a bucket for each size of batch, and the limit of torch is eight
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    model.captioner.compile(fullgraph=True, dynamic=False, backend=backend)
    model.caption_bucket = bucket


@contextmanager
def refusals_as_sentences() -> Iterator[None]:
    """A compiler that fails is a FastidcError."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError) as error:
        cause = getattr(error, "inner_exception", error)
        first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise FastidcError(f"torch.compile cannot compile the captioner ({first.strip()}); train with --compile off.") from error


@contextmanager
def shown_in(bar: tqdm, wanted: bool) -> Iterator[None]:
    """While the block runs, ``bar`` says when the compiler works and how long it has worked. Not ``wanted``: nothing; it would be the import of
    the compiler, which takes seconds."""
    if not wanted or bar.disable:
        yield
        return
    from torch._dynamo.callback import callback_handler

    name, began, seconds = bar.desc.removesuffix(": "), 0.0, 0.0

    def begin(_) -> None:
        nonlocal began
        began = time.perf_counter()
        bar.set_description(f"{name}, compiling")

    def end(_) -> None:
        nonlocal seconds
        seconds += time.perf_counter() - began
        bar.set_description(f"{name} (compiled in {seconds:.0f} s)")

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)
