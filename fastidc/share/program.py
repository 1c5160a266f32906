"""`fastidc export RUN DST.pt2 --program`: captioning as one file that PyTorch runs without fastidc."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastidc.describe.loading import Ready, load
from fastidc.errors import FastidcError
from fastidc.files import aside
from fastidc.share.template import template
from fastidc.tokenizer import Tokenizer

SUFFIX = ".pt2"
MOST_PAIRS = 4096  # a batch: what its upper bound is does not matter, but torch.export wants one
VOCABULARY, METADATA, EXAMPLE = "vocabulary.json", "metadata.json", "example.py"
# Kernels of ours would be operators that only fastidc can run.
_TORCH_ALONE = "attention=sdpa,layer_norm=torch,quick_gelu=torch,patches=torch"


@dataclass(frozen=True)
class Program:
    """What `export_program` wrote."""

    out: Path
    bytes: int
    parameters: int
    max_words: int
    image_size: int

    def __str__(self) -> str:
        size = self.image_size
        return (
            f"wrote {self.out}: {self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB; before, after uint8 [B, 3, {size}, {size}] -> ids "
            f"[B, {self.max_words}], greedy, fp32\nrun it with torch alone: {EXAMPLE} in the file's extra files shows how"
        )


def export_program(source: Any, out: str | os.PathLike, *, max_words: int | None = None, overwrite: bool = False) -> Program:
    """Writes ``out``, a ``torch.export`` program of ``source``'s greedy captions: before, after uint8 [B, 3, S, S] -> ids int64
    [B, max_words], zero after the end token; B is any number from 1 to `MOST_PAIRS`.

    source: a fine-tuned run, or what else `Describer` takes but a model in memory. max_words: tokens of the longest caption, by default that
    of the model's training. The file's extra files are `VOCABULARY`, what each id writes (a string whose characters are bytes),
    `METADATA`, and `EXAMPLE`, a script that captions pairs with torch and Pillow. FastidcError where ``out`` exists (and not ``overwrite``), is not
    named .pt2, or ``source`` holds no captioner; nothing is then written.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise FastidcError(f"{out}: a program's name ends in {SUFFIX}.")
    if out.is_dir():
        raise FastidcError(f"{out}: is a folder, and a program is a file; choose another DST.")
    if out.exists() and not overwrite:
        raise FastidcError(f"{out}: already exists; choose another DST, or add --overwrite.")
    ready = load(source, "cpu", "fp32", max_words)
    ready.check_captioner()
    extra = _extra_files(ready)
    exported = _exported(ready)
    parameters = sum(tensor.numel() for tensor in exported.state_dict.values())
    with aside(out) as temporary, open(temporary, "xb") as file:
        torch.export.save(exported, file, extra_files=extra)
    return Program(out, out.stat().st_size, parameters, ready.max_words, ready.model.config.image_size)


def _exported(ready: Ready) -> "torch.export.ExportedProgram":
    from fastidc.share.captions import GreedyCaptions

    size = ready.model.config.image_size
    module = GreedyCaptions(ready.model, ready.max_words).eval()
    batch = torch.export.Dim("batch", min=1, max=MOST_PAIRS)
    pair = tuple(torch.zeros(3, 3, size, size, dtype=torch.uint8) for _ in range(2))
    with torch.no_grad(), _torch_alone():
        exported = torch.export.export(module, pair, dynamic_shapes=({0: batch}, {0: batch}))
    nodes = [node for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    if foreign := sorted(name for node in nodes if (name := str(node.target)).startswith("fastidc")):
        raise FastidcError(f"the program would hold the operator {foreign[0]}, which torch does not have; this is a fault of fastidc.")
    for node in nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    exported.example_inputs = None  # a pickle, of use to nobody
    return exported


@contextmanager
def _torch_alone() -> Iterator[None]:
    """Ops served by torch while a program is made, whatever FASTIDC_BACKEND asks for."""
    before = os.environ.get("FASTIDC_BACKEND")
    os.environ["FASTIDC_BACKEND"] = _TORCH_ALONE
    try:
        yield
    finally:
        del os.environ["FASTIDC_BACKEND"]
        if before is not None:
            os.environ["FASTIDC_BACKEND"] = before


def _extra_files(ready: Ready) -> dict[str, str]:
    config = ready.model.config
    metadata = {
        "format": "fastidc-program",
        "version": 1,
        "inputs": "before, after: uint8 [B, 3, image_size, image_size], RGB, squashed with Pillow's bicubic filter, never cropped",
        "output": "ids int64 [B, max_words], 0 after end_id",
        "image_size": config.image_size,
        "max_words": ready.max_words,
        "start_id": config.start_id,
        "end_id": config.end_id,
        "most_pairs": MOST_PAIRS,
        "torch": torch.__version__,
    }
    words = [word.decode("latin-1") for word in Tokenizer.of(config).words()]
    return {
        METADATA: json.dumps(metadata, indent=2) + "\n",
        VOCABULARY: json.dumps(dict(enumerate(words))) + "\n",
        EXAMPLE: template("example.py.j2").render(),
    }
