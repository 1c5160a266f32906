"""Importing is free, and every optional package may be absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

OPTIONAL = ("triton", "cupy", "nvidia.dali", "xformers", "open_clip")
BLOCK = "import sys\nsys.modules[{name!r}] = None\n"  # absent, to `import` and to `find_spec`
EVERYTHING = """
import importlib, pkgutil, fastidc, fastidc_kernels
for package in (fastidc, fastidc_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for name in fastidc.__all__:
    getattr(fastidc, name)
"""


def run(code: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in OPTIONAL if name != "triton"])
def test_every_module_imports_without(name):
    run(BLOCK.format(name=name) + EVERYTHING)


def test_the_library_imports_without_triton():
    """Device code is Triton's language, and is imported by the call that launches it; nothing of the library needs it before."""
    library = EVERYTHING.replace("(fastidc, fastidc_kernels)", "(fastidc,)")
    refused = """
import torch
from fastidc import ops
qkv = torch.randn(1, 4, 96)
assert ops.self_attention(qkv, 2).shape == (1, 4, 32)
try:
    ops.self_attention(qkv, 2, backend="triton")
except ValueError as error:
    print(error)
"""
    assert "the package triton is not installed." in run(BLOCK.format(name="triton") + library + refused)
    assert run(library + "import sys\nprint([m for m in ('triton', 'torch._dynamo') if m in sys.modules])").strip() == "[]"


def test_importing_starts_nothing():
    """No module of ours pulls in the heavy optional packages, starts CUDA, a process group, Java or threads of its own."""
    out = run(
        EVERYTHING
        + """
import sys, threading, torch
heavy = [m for m in ("open_clip", "cupy", "nvidia.dali", "xformers", "pycocoevalcap", "torchvision", "tyro") if m in sys.modules]
print(heavy, torch.cuda.is_initialized(), torch.distributed.is_initialized(), threading.active_count())
"""
    )
    assert out.split("\n")[0] == "[] False False 1"


def test_bare_import_is_light():
    assert run("import sys, fastidc; print('torch' in sys.modules)").strip() == "False"
