"""torch.compile around the captioner, and what a user sees of it; whether: `fastidc.train.policy`."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.packed import length_bucket


def compile_captioner(model: CLIP4IDC, *, backend: str = "inductor") -> None:
    """Has encoder, decoder and head of ``model``'s captioner compiled, one graph for each of `length_bucket`'s lengths, each when it first comes up;
    FastidcError comes up there too where the compiler fails. Of packed captions a graph takes any number of words; padded ones are filled up,
    and as pads follow the end token, no row with a target sees one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # one user's graphs for all of his runs; torch's own default, which it writes there when it is first asked, is a temporary folder
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastidc" / "inductor"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)
    dynamo = torch._dynamo.config  # a graph a bucket for each size of batch, and the limit of torch is eight
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    model.captioner.compile(fullgraph=True, dynamic=False, backend=backend)
    model.caption_bucket = length_bucket


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
