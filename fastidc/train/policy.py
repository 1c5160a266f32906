"""Which accelerations of a training step are at work, and why not the others: decided here, once, from what is known before a run."""

from dataclasses import dataclass, fields
from typing import Literal

import torch

from fastidc.config import Recipe
from fastidc.errors import FastidcError
from fastidc.train.fp8 import refusals

Choice = Literal["auto", "on", "off"]

_FROZEN = "the backward pass below the first layer that trains, and frozen matrices' gradients"
DEAD_WORK = {
    "adapt": (
        "pads of captions",
        "the last inter layer beyond the two class tokens",
        "the last text layer beyond the end tokens",
        _FROZEN,
    ),
    "finetune": ("the text tower", "the before-image a second time", "pads of captions in the decoder and in its head", _FROZEN),
}
"""What the official code computes and nothing depends on. No switch: leaving it out changes no result."""


@dataclass(frozen=True)
class Part:
    """Whether it is at work, and the reason as a clause."""

    active: bool
    why: str


@dataclass(frozen=True)
class Policy:
    """How a stage's training step runs."""

    compile: Part  # torch.compile around the captioner
    graph: Part  # the whole step as CUDA graphs
    shadows: Part  # half-precision weights beside the fp32 ones
    buckets: Part  # gradients travel between processes in bf16
    fp8: Part  # products in 8-bit floating point

    def lines(self) -> list[str]:
        """A line each."""
        names = {"compile": "compiled captioner", "graph": "CUDA graph of the step", "shadows": "half-precision shadow weights"}
        names |= {"buckets": "bf16 gradient buckets", "fp8": "FP8 products"}
        parts = {names[field.name]: getattr(self, field.name) for field in fields(self)}
        return [f"{name}: {'on' if part.active else 'off'}, {part.why}" for name, part in parts.items()]


def policy(
    stage: str,
    device: str,
    precision: str,
    recipe: Recipe,
    processes: int = 1,
    fsdp: bool = False,
    *,
    compiling: Choice = "auto",
    graph: Choice = "auto",
    fp8: bool = False,
) -> Policy:
    """What ``--compile``, ``--graph`` and ``--fp8`` mean for a run; FastidcError where one of them cannot be.

    None of it was measured on a GPU yet, so "auto" goes by arithmetic: a step of 16 to 128 pairs waits for its launches, and a large one for
    memory.
    """
    for name, choice in (("compile", compiling), ("graph", graph)):
        if choice not in ("auto", "on", "off"):
            raise FastidcError(f"unknown --{name} {choice!r}; choose one of auto, on, off.")
    return Policy(
        _compile(compiling, stage, device, fsdp),
        _graph(graph, device, precision, recipe, processes, fsdp),
        _shadows(precision, fsdp),
        _buckets(device, precision, processes, fsdp, graph),
        _fp8(fp8, device, precision, fsdp),
    )


def _compile(choice: Choice, stage: str, device: str, fsdp: bool) -> Part:
    """ "auto" compiles captioning on CUDA: the element-wise work between two products is one kernel. On a CPU a step waits neither for launches
    nor for memory, and the compiler takes minutes first."""
    if choice == "off":
        return Part(False, "as asked for")
    if stage == "adapt":
        return Part(False, "adaptation has no captioner")
    if fsdp:
        if choice == "on":
            raise FastidcError(
                "--compile on does not go with --fsdp, whose gathers between the layers break the graph; leave one of them out."
            )
        return Part(False, "--fsdp gathers parameters between the layers, which breaks the graph")
    if choice == "auto" and device != "cuda":
        return Part(False, f"on {device} there are no launches to save, and the compiler takes minutes")
    return Part(True, "as asked for" if choice == "on" else "what lies between two products is one kernel")


def _graph(choice: Choice, device: str, precision: str, recipe: Recipe, processes: int, fsdp: bool) -> Part:
    if choice == "off":
        return Part(False, "as asked for")
    refusal = _no_graph(device, precision, recipe, fsdp)
    if refusal is not None:
        if choice == "on":
            raise FastidcError(f"--graph on cannot be: {refusal}; leave it out.")
        return Part(False, refusal)
    if processes > 1 and choice == "auto":
        return Part(False, "with several processes it was never tried; --graph on captures their averaging, too")
    return Part(True, "as asked for" if choice == "on" else "a step is one launch")


def _no_graph(device: str, precision: str, recipe: Recipe, fsdp: bool) -> str | None:
    """Why there can be none, as a clause."""
    if device != "cuda":
        return f"on {device} there are no launches to save"
    if fsdp:
        return "--fsdp frees and gathers parameters at addresses of the moment"
    if recipe.optimizer != "bert_adam":
        return f"{recipe.optimizer} takes its rates from the host, and a graph would keep them"
    if precision == "fp16":
        return "fp16 keeps part of its loss scale on the host"
    if precision == "fp16-official":
        return "fp16-official takes its rates from the host, and a graph would keep them"
    return None


def _shadows(precision: str, fsdp: bool) -> Part:
    if precision not in ("bf16", "fp16"):
        return Part(False, f"{precision} casts no weights")
    if fsdp:
        return Part(False, "--fsdp gathers weights for a block at a time, which is when they are cast")
    return Part(True, "a step casts next to no weight")


def _buckets(device: str, precision: str, processes: int, fsdp: bool, graph: Choice) -> Part:
    if processes == 1:
        return Part(False, "there is one process")
    if fsdp:
        return Part(False, "--fsdp scatters gradients itself")
    if precision != "bf16":
        return Part(False, f"{precision} is averaged in fp32")
    if device != "cuda":
        return Part(False, f"on {device} nothing travels far")
    if graph == "on":
        return Part(False, "what rounds the buckets is a call of Python's, which no graph was tried with")
    return Part(True, "half the bytes, and they travel while the backward pass goes on")


def _fp8(wanted: bool, device: str, precision: str, fsdp: bool) -> Part:
    refused = refusals(torch.device(device), precision, fsdp)
    if not wanted:
        cannot = f", and it cannot be: {refused[0].rstrip('.')}" if refused else "; it gives other numbers"
        return Part(False, f"not asked for (--fp8){cannot}")
    if refused:
        raise FastidcError(f"--fp8 cannot be: {refused[0]}")
    return Part(True, "as asked for: products of the blocks that gain from it, weights' gradients in bf16")
