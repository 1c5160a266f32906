"""Devices, driver, memory, disk and Java of this machine, and what they mean for a cache of images."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastidc.data import sources
from fastidc.data.resident import bytes_of

SIZE = 224
SETS = {"CLEVR-Change": 3 * 39_803, "Spot-the-Diff": 2 * 11_329}
"""Images of the two data sets whose caches are reckoned: 18.0 GB and 3.4 GB at 224."""


def devices() -> list[dict[str, Any]]:
    """The CUDA devices that torch can use, with free and whole memory in bytes."""
    out = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        free, whole = torch.cuda.mem_get_info(index)
        out.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}", "free_bytes": free, "memory_bytes": whole})
    return out


def driver() -> str | None:
    """NVIDIA's driver, as the kernel or nvidia-smi names it; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text):
            return match[1]
    except OSError:
        pass
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        lines = done.stdout.strip().splitlines()
        return lines[0].strip() if done.returncode == 0 and lines else None
    return None


def without_device(found: list[dict[str, Any]], driver_version: str | None) -> str:
    """Why there is no device, as a clause; empty where there is one."""
    if found:
        return ""
    if torch.version.cuda is None:
        return "torch is a build for CPUs" + (f", though there is a driver {driver_version}" if driver_version else "")
    if driver_version:
        return f"there is a driver {driver_version}, but torch for CUDA {torch.version.cuda} finds no device it can use"
    return "no driver of NVIDIA's is here"


def java() -> dict[str, Any]:
    """{"here": whether METEOR can be had, "said": a line}. Starts `java -version`."""
    from fastidc.evaluate.java import java_status

    here, said = java_status()
    return {"here": here, "said": said if here else f"{said}: METEOR is left out, and our own port of the PTB tokeniser serves"}


def memory(folder: Path) -> dict[str, Any]:
    """Bytes: free on the disk of ``folder`` (the nearest one above it that exists), and in the host's memory; None where nobody says."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        disk = shutil.disk_usage(place).free
    except OSError:
        disk = None
    return {
        "folder": str(folder.absolute()),
        "writable": os.access(place if place.is_dir() else place.parent, os.W_OK),
        "disk_free_bytes": disk,
        "host_free_bytes": sources.available_bytes(),
    }


def caches(device: torch.device, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each of `SETS`: bytes of its cache, whether the disk has room, and what --loader auto makes of it on ``device``, as a sentence."""
    out = []
    for name, images in SETS.items():
        needed, free = bytes_of(images, SIZE), found["disk_free_bytes"]
        loader, why = sources.fitting(needed, device, 1)
        if loader == "cache" and device.type == "cpu":
            why = ", read from the disk: for a CPU the system keeps in memory what was read."
        room = free is None or needed <= free
        out.append({"data": name, "bytes": needed, "room": room, "loader": loader, "said": why.lstrip(", ")})
    return out
