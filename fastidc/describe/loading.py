"""A model made ready to be asked: read, on its device, in evaluation mode, with its tokenizer and what its run folder says."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastidc import checkpoint
from fastidc.describe.no_change import NoChange
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import Tokenizer

MODEL_VARIABLE = "FASTIDC_MODEL"
_DEMO = {"caption": Path("runs/demo/finetune"), "search": Path("runs/demo/adapt")}
MAX_WORDS = 32  # of both official stages, where a model does not say what it was trained with

Precision = Literal["auto", "bf16", "fp32"]


def default_model(use: Literal["caption", "search"] = "caption") -> str:
    """Which model serves where none is named: the environment variable FASTIDC_MODEL, else the demo's run in ./runs/demo.

    Captions need the fine-tuned run; search takes the adapted one, because fine-tuning does not keep pairs and sentences aligned.
    FastidcError where there is neither.
    """
    if named := os.environ.get(MODEL_VARIABLE):
        return named
    if (_DEMO[use] / checkpoint.CONFIG_FILE).is_file():
        return str(_DEMO[use])
    raise FastidcError(
        f"no model is named: give --model (in Python: model=...), set {MODEL_VARIABLE}, or make {_DEMO[use]} with `fastidc demo`."
    )


@dataclass(frozen=True)
class Ready:
    """What captions and search both need of a model."""

    model: CLIP4IDC  # in evaluation mode
    tokenizer: Tokenizer
    source: str  # as a user reads it
    max_words: int  # tokens of the longest caption
    autocast_dtype: torch.dtype | None = None
    no_change: NoChange | None = None  # what its run folder says of captions without a change

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @contextmanager
    def asked(self) -> Iterator[None]:
        """No gradients, and products in half precision where that was chosen."""
        cast = nullcontext() if self.autocast_dtype is None else torch.autocast(self.device.type, self.autocast_dtype)
        with torch.no_grad(), cast:
            yield

    def check_captioner(self) -> None:
        """FastidcError where the model can tell no captions."""
        if self.model.captioner is None:
            raise FastidcError(
                f"{self.source}: this model has no captioner, it is an adapted model; fine-tune it with `fastidc finetune --init`, or give a "
                "fine-tuned run."
            )


def load(source, device: str = "auto", precision: Precision = "auto", max_words: int | None = None) -> Ready:
    """``source``: whatever `CLIP4IDC.from_pretrained` reads, a `CLIP4IDC` (put into evaluation mode), or what this returned before.

    device: "auto" is CUDA where there is one; a model in memory stays where it is. precision: "auto" is bf16 on a GPU that has it, else fp32.
    FastidcError for a plain CLIP too, whose pair parameters would be random.
    """
    if isinstance(source, Ready):
        return source if max_words is None else replace(source, max_words=_checked(max_words, source.model, source.source))
    if isinstance(source, CLIP4IDC):
        model, name, facts, no_change = source, "the model", {}, None
        if device != "auto":
            model = model.to(_device(device))
    else:
        found = _device(device)  # a wish that cannot be met is said before anything is read
        read = checkpoint.read(source)
        name, facts = os.fspath(source), read.facts
        if any(part in checkpoint.PAIR_PARAMETERS for part in read.fresh):
            raise FastidcError(f"{name}: a plain CLIP, which has never seen a pair; adapt it first (`fastidc adapt --init`).")
        with torch.random.fork_rng(devices=[]):  # parameters are drawn before they are read, which is not the caller's business
            model = CLIP4IDC(read.config)
        model.load_weights(read.weights, read.source, read.fresh, read.foreign)
        model = model.to(found)
        no_change = None if read.folder is None else NoChange.of_run(read.folder)
    recipe = facts.get("recipe")
    trained = recipe.get("max_words", MAX_WORDS) if isinstance(recipe, dict) else MAX_WORDS
    words = min(MAX_WORDS if not isinstance(trained, int) else trained, model.config.context_length)
    if max_words is not None:
        words = _checked(max_words, model, name)
    model.eval()
    return Ready(model, Tokenizer.of(model.config), name, words, _autocast(precision, model.logit_scale.device), no_change)


def digest_of(about: str, *modules: nn.Module) -> str:
    """BLAKE2b-128, hexadecimal, of ``about`` and of the names, shapes, dtypes and bytes of the modules' parameters."""
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for module in modules:
        for name, weight in sorted(module.named_parameters()):
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _checked(max_words: int, model: CLIP4IDC, name: str) -> int:
    if not 3 <= max_words <= model.config.context_length:
        raise FastidcError(
            f"{name}: max_words is {max_words}; from 3 (start, a word, end) to the model's {model.config.context_length} positions can be asked for."
        )
    return max_words


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise FastidcError(f"device is {name!r}; auto, cpu or cuda was expected.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FastidcError("device is cuda, but PyTorch finds no CUDA device here; use auto or cpu.")
    return device


def _autocast(precision: Precision, device: torch.device) -> torch.dtype | None:
    if precision not in ("auto", "bf16", "fp32"):
        raise FastidcError(f"precision is {precision!r}; auto, bf16 or fp32 was expected.")
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if precision == "bf16" else None
