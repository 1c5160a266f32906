"""Which packages are here, for which CUDA they were built, whether they can be imported at all, and what it costs to be without."""

import importlib
import importlib.metadata
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Package:
    """``module``: what is imported. ``wheels``: the names it has at a registry, one a CUDA where they differ. ``cost``: what there is none of without."""

    name: str
    module: str
    wheels: tuple[str, ...]
    cost: str
    cuda: str = ""  # with {}: the wheel's name for a CUDA major
    gpu: bool = False  # nothing uses it on a CPU


PACKAGES = (
    Package("Triton", "triton", ("triton",), "no fused kernels; PyTorch's own serve"),
    Package(
        "CuPy",
        "cupy",
        ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "no CUDA C++ kernels; PyTorch gathers patches, DALI squashes",
        "cupy-cuda{}x",
    ),
    Package(
        "DALI",
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "nothing by default; --loader dali and --builder dali are refused",
        "nvidia-dali-cuda{}0",
    ),
    Package("xformers", "xformers", ("xformers",), "nothing: SDPA serves", gpu=True),
    Package(
        "open_clip", "open_clip", ("open_clip_torch",), "no tokenizer, so no training and no captions, and no open_clip:NAME/TAG weights"
    ),
    Package("pycocoevalcap", "pycocoevalcap", ("pycocoevalcap",), "no METEOR; our own port of the PTB tokeniser serves the other scores"),
    Package("matplotlib", "matplotlib", ("matplotlib",), "no fastidc caption --figure; pages of fastidc report need none"),
    Package("TensorBoard", "tensorboard", ("tensorboard",), "nothing by default; --tensorboard is refused"),
    Package("huggingface_hub", "huggingface_hub", ("huggingface_hub",), "no hub:OWNER/NAME weights and no fastidc push"),
)
BASE = ("torch", "torchvision", "numpy", "pillow", "safetensors", "tyro", "tqdm", "jinja2")
"""Without these nothing works; their versions are told."""


def version_of(wheel: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None


def look(package: Package) -> dict[str, Any]:
    """{"name", "wheel", "version", "cuda", "state": "here" | "absent" | "broken", "said": what that means as a clause}.

    The package is imported: one that is installed is not yet one that works. Not so one for GPUs where there is none: xformers takes seconds.
    """
    wheel, version = next(((wheel, found) for wheel in package.wheels if (found := version_of(wheel))), (None, None))
    facts = {"name": package.name, "wheel": wheel, "version": version, "cuda": None, "state": "here", "said": ""}
    if version is not None and package.gpu and not torch.cuda.is_available():
        return facts | {"said": "was not tried, as there is no GPU to run it on"}
    try:
        with _warnings() as warned:
            module = importlib.import_module(package.module)
    except Exception as error:  # of whatever kind, it must not end the report
        mine = isinstance(error, ModuleNotFoundError) and error.name is not None and package.module.startswith(error.name)
        if mine and version is None:
            return facts | {"state": "absent", "said": package.cost}
        first = next(iter(str(error).strip().splitlines()), "")
        why = f"cannot be imported ({type(error).__name__}: {first[:160]})"
        return facts | {"state": "broken", "said": f"{why}; install it again. Until then: {package.cost}", "cuda": _built_for(wheel, None)}
    said = f"warns: {' '.join(warned[0].split())[:200]}" if warned else ""
    return facts | {"cuda": _built_for(wheel, module) if package.cuda else None, "said": said}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is logged meanwhile from warnings on: a package that has lost its compiled half says so and goes on (xformers)."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield said
    finally:
        root.removeHandler(handler)


def _built_for(wheel: str | None, module: Any) -> int | None:
    """The CUDA major that a wheel is for, by its name, or by what the module says."""
    if match := re.search(r"-cuda(\d\d)", wheel or ""):
        return int(match[1])
    built = getattr(module, "__cuda_version__", None)
    if built is None and hasattr(module, "cuda"):
        try:
            built = module.cuda.runtime.runtimeGetVersion()
        except Exception:  # CuPy's own error, without a driver
            return None
    return None if built is None else int(built) // 1000


def cuda_majors(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """{"majors": {"torch": 13, "DALI": 13, "CuPy": None}, "said": sentences where they differ}: one process holds one CUDA."""
    ours = None if torch.version.cuda is None else int(torch.version.cuda.partition(".")[0])
    majors: dict[str, int | None] = {"torch": ours}
    said = []
    patterns = {package.name: package for package in PACKAGES if package.cuda}
    for facts in found:
        package = patterns.get(facts["name"])
        if package is None:
            continue
        majors[package.name] = facts["cuda"]
        if facts["cuda"] is None or facts["cuda"] == ours:
            continue
        if ours is None:
            said.append(
                f"{package.name} is for CUDA {facts['cuda']} and torch for CPUs only: on a GPU nothing runs; install a torch for CUDA "
                f"{facts['cuda']}, or nothing if there is no GPU."
            )
        else:
            right = package.cuda.format(ours)
            said.append(
                f"{package.name} is for CUDA {facts['cuda']} and torch for CUDA {ours}, and the two do not go together in one process: "
                f"pip uninstall {facts['wheel']}, then pip install {right}."
            )
    return {"majors": majors, "said": said}
