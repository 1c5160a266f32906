"""`python -m bench`: what it lists and what it refuses, and how."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import families
from bench.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["atention"], "unknown family 'atention'; choose one of attention, info_nce"),
        ([], "name a family"),
        (["attention", "--only", "L=5.0", "--cpu"], "no case of attention has 'L=5.0' in its name"),
        (["attention", "--dtype", "int8"], "invalid choice"),
        (["attention", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_refusals_are_sentences(arguments, sentence, capsys):
    assert main(arguments) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("bench: ")
    assert sentence in out.err
    assert len(out.err.splitlines()) == 1


@pytest.mark.parametrize("tool", ["aot", "count", "device", "plot"])
def test_every_tool_refuses_in_a_sentence(tool, capsys):
    assert importlib.import_module(f"bench.{tool}").main(["--flight"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bench.{tool}: ")
    assert err.endswith(f"`python -m bench.{tool} --help` lists the options.\n")
    assert len(err.splitlines()) == 1


def test_several_parts_of_names_and_one_variant_of_one_case(capsys):
    assert main(["attention", "--list", "--only", "L=50", "--only", "L=394"]) == 0
    assert {line.split(" L=")[1][:3].strip() for line in capsys.readouterr().out.splitlines()[1:]} == {"50", "394"}
    assert main(["patches", "--smoke", "--cpu", "--skip", "tiny P=16 32x32 K=3::index + F.unfold"]) == 0
    assert "skipped: left out by --skip." in capsys.readouterr().out


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what happens without a CUDA device: run it where there is none, or with CUDA_VISIBLE_DEVICES="
)
def test_without_cuda(capsys):
    assert main(["attention"]) == 2
    assert "there is no CUDA device here; give --cpu" in capsys.readouterr().err


def test_list(capsys):
    """Every family at every scale builds its cases; those of the paper stand first."""
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for name in families.NAMES:
        assert f"\n{name}: " in f"\n{out}"
    for case in (
        "intra B/32 L=50 H=12 n=4096",
        "inter B/16 L=394",
        "intra L/14 L=257",
        "inter L/14 L=514",
        "B=65536 D=512",
        "B/32 adapt B=1024",
    ):
        assert case in out
    assert out.index("intra B/32") < out.index("intra B/16")
    for flag in ("--cpu", "--smoke"):
        assert main(["--list", flag]) == 0


def test_one_family_runs(capsys, tmp_path):
    assert main(["layer_norm", "--smoke", "--cpu", "--csv", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "fastidc:torch" in out
    assert " ms" not in out
    assert len(list(tmp_path.rglob("*-layer_norm.csv"))) == 1


@pytest.mark.slow
def test_a_bare_checkout_runs():
    """torch, triton, cupy, numpy and Pillow are enough; whatever else is absent becomes rows."""
    absent = ("open_clip", "nvidia.dali", "xformers", "pycocoevalcap", "tyro", "safetensors", "torchvision", "jinja2")
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    code = block + "from bench.__main__ import main\nsys.exit(main(['info_nce', 'loader', '--smoke', '--cpu']))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "open_clip is not installed." in done.stdout
    assert "torchvision is not installed." in done.stdout
