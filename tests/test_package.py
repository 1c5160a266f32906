"""The wheel: pure Python, both packages and the page template inside, importable from a fresh environment."""

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
    assert {"fastidc/cli.py", "fastidc_kernels/__init__.py", "fastidc/evaluate/report.html.j2", "fastidc/py.typed"} <= set(names)
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
    assert set(project["optional-dependencies"]) == {"cuda12", "cuda13", "tensorboard", "bench", "dev", "all"}
    assert project["requires-python"] == ">=3.11"
    core = {d.split(">")[0].split(";")[0] for d in project["dependencies"]}
    assert {"torch", "torchvision", "open_clip_torch", "pycocoevalcap", "safetensors"} <= core
    assert "torch>=2.10" in project["dependencies"], "older ones can be made to run code by weights_only=True"
