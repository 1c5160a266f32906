"""`fastidc doctor`: absences, breakages and mismatches are lines with what they cost, never a crash."""

import json
import logging
import sys
from types import ModuleType

import pytest
import torch

from fastidc import doctor
from fastidc.cli import main
from fastidc.config import PRESETS
from fastidc.doctor import choices, machine, packages
from fastidc.train.precision import Precision

BY_NAME = {package.name: package for package in packages.PACKAGES}


@pytest.fixture(scope="module")
def facts():
    return doctor.examine()


def test_the_report_is_whole_and_narrow(facts):
    shown = doctor.text_of(facts)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("fastidc ")
    for wanted in (
        "CUDA devices: ",
        "driver: ",
        "java: ",
        "CUDA majors: torch ",
        "room for a cache",
        "backends on ",
        "gradients of shadowed weights: ",
    ):
        assert any(line.strip().startswith(wanted) for line in lines), wanted
    assert "CLEVR-Change: 18.0 GB" in shown
    assert "Spot-the-Diff: 3.4 GB" in shown
    assert [step["stage"] for step in facts["steps"]] == ["adaptation", "captioning"]
    assert {call["call"].partition(",")[0] for call in facts["backends"]["calls"]} >= {"attention", "info_nce", "patches"}


def test_json_is_what_the_text_says(monkeypatch, capsys, facts):
    monkeypatch.setattr(doctor, "examine", lambda data=None: facts)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == doctor.text_of(facts) + "\n"


@pytest.mark.parametrize("package", packages.PACKAGES, ids=lambda package: package.name)
def test_an_absent_package_is_a_line_with_its_cost(monkeypatch, facts, package):
    monkeypatch.setattr(packages, "version_of", lambda wheel: None)
    monkeypatch.setitem(sys.modules, package.module, None)
    found = packages.look(package)
    assert (found["state"], found["said"]) == ("absent", package.cost)
    shown = doctor.text_of(facts | {"packages": [found]})
    assert f"{package.name} absent: {package.cost}"[:90] in shown


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("libnvjpeg.so.13: cannot open shared object file\nand more"),
            "ImportError: libnvjpeg.so.13: cannot open shared object file",
        ),
        (OSError("wrong ELF class"), "OSError: wrong ELF class"),
        (ModuleNotFoundError("No module named 'six'", name="six"), "ModuleNotFoundError: No module named 'six'"),
        (AttributeError("module 'numpy' has no attribute 'bool8'"), "AttributeError: module 'numpy'"),
    ],
)
def test_a_broken_package_is_a_line(monkeypatch, facts, error, said):
    monkeypatch.setattr(packages, "version_of", lambda wheel: "1.0" if wheel == "nvidia-dali-cuda130" else None)

    def broken(name):
        raise error

    monkeypatch.setattr(packages.importlib, "import_module", broken)
    found = packages.look(BY_NAME["DALI"])
    assert found["state"] == "broken"
    assert f"cannot be imported ({said}" in found["said"]
    assert "and more" not in found["said"], "the first line"
    assert BY_NAME["DALI"].cost in found["said"]
    assert found["cuda"] == 13, "by the wheel's name"
    assert "DALI 1.0 (nvidia-dali-cuda130) broken: cannot be imported" in doctor.text_of(facts | {"packages": [found]})


def test_a_package_that_is_installed_and_gone_is_broken(monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda wheel: "3.3")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert packages.look(BY_NAME["open_clip"])["state"] == "broken"


def test_what_a_package_warns_of_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packages, "version_of", lambda wheel: "0.0.35")

    def warns(name):
        logging.getLogger("xformers").warning("can't load\n  its extensions")
        return ModuleType(name)

    monkeypatch.setattr(packages.importlib, "import_module", warns)
    found = packages.look(BY_NAME["xformers"])
    assert (found["state"], found["said"]) == ("here", "warns: can't load its extensions")


def test_packages_for_gpus_are_not_tried_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(packages, "version_of", lambda wheel: "0.0.35")
    monkeypatch.setattr(packages.importlib, "import_module", lambda name: pytest.fail("it was imported"))
    assert packages.look(BY_NAME["xformers"])["said"] == "was not tried, as there is no GPU to run it on"


def built(monkeypatch, cuda, **wheels):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = []
    for name, wheel in wheels.items():
        found.append({"name": name, "wheel": wheel, "cuda": packages._built_for(wheel, None)})
    return packages.cuda_majors(found)


def test_cuda_majors_that_differ(monkeypatch, facts):
    majors = built(monkeypatch, "13.2", DALI="nvidia-dali-cuda120", CuPy="cupy-cuda13x")
    assert majors["majors"] == {"torch": 13, "DALI": 12, "CuPy": 13}
    (sentence,) = majors["said"]
    assert sentence.startswith("DALI is for CUDA 12 and torch for CUDA 13, and the two do not go together")
    assert "pip uninstall nvidia-dali-cuda120, then pip install nvidia-dali-cuda130." in sentence
    assert "DALI 12" in doctor.text_of(facts | {"cuda": majors})
    majors = built(monkeypatch, "12.8", DALI="nvidia-dali-cuda120", CuPy="cupy-cuda13x")
    assert "then pip install cupy-cuda12x." in majors["said"][0]
    assert built(monkeypatch, "12.8", DALI="nvidia-dali-cuda120", CuPy="cupy-cuda12x")["said"] == []
    (sentence,) = built(monkeypatch, None, CuPy="cupy-cuda13x")["said"]
    assert "torch for CPUs only" in sentence
    assert built(monkeypatch, "13.0", CuPy=None) == {"majors": {"torch": 13, "CuPy": None}, "said": []}


def test_a_cuda_major_by_what_the_module_says():
    module = ModuleType("nvidia.dali")
    module.__cuda_version__ = 12090
    assert packages._built_for(None, module) == 12
    assert packages._built_for("cupy", ModuleType("cupy")) is None


def test_devices_and_why_there_is_none(monkeypatch, facts):
    assert machine.without_device([{}], None) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert machine.without_device([], "570.86.15") == "there is a driver 570.86.15, but torch for CUDA 13.2 finds no device it can use"
    assert machine.without_device([], None) == "no driver of NVIDIA's is here"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.without_device([], "570.86.15") == "torch is a build for CPUs, though there is a driver 570.86.15"
    card = {"name": "NVIDIA H100", "capability": "9.0", "free_bytes": 70 * 10**9, "memory_bytes": 80 * 10**9}
    shown = doctor.text_of(facts | {"devices": [card], "driver": "570.86.15"})
    assert "  NVIDIA H100, compute capability 9.0, 80.0 GB, of which 70.0 GB free\n" in shown
    assert "driver: 570.86.15" in shown


def test_devices_are_asked(monkeypatch):
    answers = {"is_available": True, "device_count": 1, "get_device_name": "NVIDIA L4"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5, 7))
    assert machine.devices() == [{"name": "NVIDIA L4", "capability": "8.9", "free_bytes": 5, "memory_bytes": 7}]


def test_the_driver_by_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.Path, "read_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError()))
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.95.05\n")
    smi.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(smi))
    assert machine.driver() == "580.95.05"
    smi.write_text("#!/bin/sh\necho failed; exit 9\n")
    assert machine.driver() is None
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.driver() is None


def test_the_driver_by_the_kernel(monkeypatch):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U22)\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda *args, **kwargs: text)
    assert machine.driver() == "570.86.15"


GB = 10**9


@pytest.mark.parametrize(
    ("device_free", "host_free", "loaders"),
    [(70, 100, ["resident", "resident"]), (40, 100, ["memory", "resident"]), (8, 20, ["cache", "memory"]), (None, 100, ["cache", "cache"])],
)
def test_what_auto_would_take(monkeypatch, facts, device_free, host_free, loaders):
    monkeypatch.setattr(machine.sources, "free_bytes", lambda device: None if device_free is None else device_free * GB)
    monkeypatch.setattr(machine.sources, "available_bytes", lambda: host_free * GB)
    found = machine.caches(torch.device("cpu" if device_free is None else "cuda:0"), {"disk_free_bytes": 10 * GB})
    assert [cache["loader"] for cache in found] == loaders
    assert [cache["room"] for cache in found] == [False, True]
    shown = " ".join(doctor.text_of(facts | {"caches": found}).split())
    assert f"CLEVR-Change: 18.0 GB, for which the disk has no room; on cpu --loader auto takes {loaders[0]}, " in shown


def test_room_of_a_folder_that_is_not_there_yet(tmp_path):
    room = machine.memory(tmp_path / "to" / "come")
    assert room["folder"] == str(tmp_path / "to" / "come")
    assert room["disk_free_bytes"] > 0
    assert room["writable"]


def test_without_java_meteor_is_said_to_be_left_out(monkeypatch):
    monkeypatch.setattr("fastidc.evaluate.java.java_status", lambda: (False, "there is no java on PATH"))
    assert machine.java() == {
        "here": False,
        "said": "there is no java on PATH: METEOR is left out, and our own port of the PTB tokeniser serves",
    }


def test_in_what_gradients_are_kept():
    recipe = PRESETS["clevr"].adapt
    assert choices._gradients("cuda", recipe, Precision("bf16", "cuda"), True) == "bf16, as they are made"
    assert choices._gradients("cuda", recipe, Precision("fp16", "cuda"), True) == "fp32, since a scaled loss is unscaled in fp32"
    assert choices._gradients("cpu", recipe, Precision("bf16", "cpu"), True).startswith("fp32, since on a CPU")
    assert choices._gradients("cpu", recipe, Precision("fp32", "cpu"), False) == "fp32, as there are no shadows"
