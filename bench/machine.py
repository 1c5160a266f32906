"""Where and with what a run was made: the part of a row that is the same for all of them."""

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3", or "cpu, 2 threads": of a CPU only ratios are reported, so its make does not matter."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash of the checkout, "+" behind it where files differ from it; "unknown" outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    if given := os.environ.get("FASTIDC_BENCH_COMMIT"):  # where only the working tree is, as on a lent machine
        return given
    try:
        head = git("rev-parse", "--short", "HEAD")
        return (head + ("+" if git("status", "--porcelain") else "")) if head else "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def facts(device: str) -> dict[str, str]:
    return {
        "device": device_name(device),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
