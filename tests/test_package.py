"""The wheel: pure Python, both packages and the page template inside, importable from a fresh environment; and what CMake builds."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*argv, **options) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_installs_into_a_fresh_environment(tmp_path):
    source = tmp_path / "source"
    run("git", "clone", "-q", ROOT, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl"), "no compiler is needed"
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "fastidc/cli.py",
        "fastidc_kernels/__init__.py",
        "fastidc/report/report.html.j2",
        "fastidc/share/card.md.j2",
        "fastidc/py.typed",
    } <= set(names)
    assert {"fastidc_kernels/cuda/patches.cu", "fastidc_kernels/cuda/patches.cuh"} <= set(names), "NVRTC compiles them where they are used"
    assert not [n for n in names if n.endswith(".fatbin")], "FASTIDC_BUILD_CUDA was not asked for"
    assert not [n for n in names if n.startswith(("tests/", "bench/", "kernels/"))]

    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    # the dependencies are this environment's: a second download of PyTorch would test nothing more
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where = run(
        python, "-c", "import fastidc, fastidc_kernels; print(fastidc.CLIP4IDC, fastidc.__file__, fastidc_kernels.__file__)", cwd=tmp_path
    )
    assert where.count(str(site)) == 2, where
    assert "render" in run(tmp_path / "env" / "bin" / "fastidc", "--help", cwd=tmp_path)


def test_extras_and_python_versions():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {"cuda12", "cuda13", "tensorboard", "hub", "bench", "dev", "all"}
    assert project["requires-python"] == ">=3.11"
    core = {d.split(">")[0].split(";")[0] for d in project["dependencies"]}
    assert {"torch", "torchvision", "open_clip_torch", "pycocoevalcap", "safetensors"} <= core
    assert "torch>=2.10" in project["dependencies"], "older ones can be made to run code by weights_only=True"


def cmake_version() -> tuple[int, int]:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not here: pip install cmake")
    return tuple(map(int, re.search(r"(\d+)\.(\d+)", run("cmake", "--version")).groups()))


def test_cmake_builds_the_arithmetic_for_a_cpu(tmp_path):
    cmake_version()
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is here: install one (apt-get install g++)")
    run("cmake", "-S", ROOT, "-B", tmp_path)
    run("cmake", "--build", tmp_path)
    library = ctypes.CDLL(str(tmp_path / "libfastidc_patches.so"))
    assert library.patches
    assert library.squash


@pytest.mark.slow
def test_cmake_builds_the_fatbin(tmp_path, monkeypatch):
    from fastidc_kernels import patches

    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here: install the CUDA toolkit")
    configure = ("cmake", "-S", ROOT, "-B", tmp_path / "build", "-DFASTIDC_CUDA=ON", "-DFASTIDC_HOST=OFF")
    if cmake_version() < (3, 27):
        done = subprocess.run(list(map(str, configure)), capture_output=True, text=True, check=False)
        assert done.returncode
        assert "A fatbin needs CMake 3.27 or newer" in done.stderr
        pytest.skip("a fatbin needs CMake 3.27: pip install 'cmake>=3.27'")
    run(*configure)
    run("cmake", "--build", tmp_path / "build")
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    folder = tmp_path / "prefix" / "fastidc_kernels" / "cuda"
    for name in ("patches.cu", "patches.cuh"):
        shutil.copy(patches.FOLDER / name, folder)
    monkeypatch.setattr(patches, "FOLDER", folder)
    assert patches.fatbin() is not None, "the launcher looks for the name that CMake gives"
    if tool := shutil.which("cuobjdump"):
        held = run(tool, "--list-elf", "--list-ptx", patches.fatbin())
        assert all(part in held for part in ("sm_80.cubin", "sm_90.cubin", "sm_90.ptx"))


@pytest.mark.parametrize(("asked", "needed"), [("", "[]"), ("1", "['cmake>=3.27']")])
def test_cmake_is_needed_for_the_fatbin_only(asked, needed):
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    out = run(sys.executable, "-c", code, cwd=ROOT, env=os.environ | {"FASTIDC_BUILD_CUDA": asked})
    assert out.splitlines()[-1] == needed
