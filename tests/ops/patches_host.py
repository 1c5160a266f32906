"""The CUDA C++ kernels and their launchers on a CPU: the arithmetic of patches.cuh as CMake builds it, and patches.cu, a thread at a time."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fastidc_kernels import patches as kernels

KINDS = {suffix: kind for kind, suffix in enumerate(kernels.SUFFIXES.values())}  # bf16, fp16, fp32: patches.cuh's Kind
ARITHMETIC, KERNELS = kernels.FOLDER / "patches_host.cpp", Path(__file__).parent / "patches_device.cpp"
OPTIONS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-O1", "-ffp-contract=off", "-shared", "-fPIC")


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip(f"no C++ compiler is here to build {source.name} with: install one (apt-get install g++)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "library.so"
        subprocess.run([compiler, *OPTIONS, f"-I{kernels.FOLDER}", "-o", str(out), str(source)], check=True)
        return ctypes.CDLL(str(out))


def call(source: Path, name: str, *numbers: int) -> None:
    """Addresses and numbers are 64 bits each."""
    getattr(library(source), name)(*map(ctypes.c_int64, numbers))


class Launches:
    """Stands where CuPy's module does, and remembers launches. Runs the arithmetic's loops on what it is given, or the kernel itself."""

    def __init__(self, source: Path):
        self.source = source
        self.seen: list[tuple] = []

    def get_function(self, name: str):
        def kernel(grid, block, arguments, shared_mem=0):
            assert all(type(x) is int for x in (*grid, *block, *arguments, shared_mem)), "CuPy takes Python's integers for 64 bits"
            assert shared_mem <= kernels.LARGEST_STRIP
            self.seen.append((name, grid, block, shared_mem))
            (self.by_kernel if self.source == KERNELS else self.by_loops)(name, grid, arguments)

        return kernel

    def by_kernel(self, name: str, grid: tuple[int, ...], arguments: tuple[int, ...]) -> None:
        columns, rows = min(grid[0], 5), min((*grid, 1)[1], 2)  # few blocks: each has several turns
        for y in range(rows):
            for x in range(columns):
                call(KERNELS, "at_block", x, y, columns, rows)
                call(KERNELS, name, *arguments)

    def by_loops(self, name: str, grid: tuple[int, ...], arguments: tuple[int, ...]) -> None:
        if name.startswith("patches"):
            assert name.startswith("patches_augmented") == bool(arguments[2])
            call(ARITHMETIC, "patches", *arguments, next(kind for suffix, kind in KINDS.items() if f"_{suffix}_" in name))
        elif name == "squash_rows":
            pictures, _, _, _, out, *facts = arguments
            call(ARITHMETIC, "squash", pictures, out, *facts)


@pytest.fixture(params=[ARITHMETIC, KERNELS], ids=["arithmetic", "kernels"])
def launches(request, monkeypatch) -> Launches:
    """The launchers of `fastidc_kernels.patches` on a CPU."""
    library(request.param)
    found = Launches(request.param)
    kernels._kernel.cache_clear()
    monkeypatch.setattr(kernels, "_module", lambda: found)
    monkeypatch.setattr(kernels._runtime, "on_torch_stream", lambda device: nullcontext())
    yield found
    kernels._kernel.cache_clear()


def pictures(*sizes, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*size, 3), generator=draw, dtype=torch.uint8) for size in sizes]
