"""What nvcc or NVRTC makes of the CUDA C++ kernels, with no GPU."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="its wheel brings cuobjdump: install the package triton")

from bench import aot, nvrtc
from fastidc_kernels import patches as kernels

NVCC = shutil.which("nvcc")
NAMES = [f"{suffix}_{size}" for suffix in kernels.SUFFIXES.values() for size in (*kernels.PATCH_SIZES, "any")]
EXPECTED = {f"patches.cu:{name}" for n in NAMES for name in (f"patches_{n}", f"patches_augmented_{n}")}
EXPECTED |= {"patches.cu:squash_weights", "patches.cu:squash_columns", "patches.cu:squash_rows"}


def compiled(arch: str, nvcc: str | None, folder: Path) -> dict[str, dict]:
    rows = aot.cuda_sources(arch, folder, nvcc)
    if "skipped" in rows[0]:
        pytest.skip(rows[0]["skipped"])
    return {row["kernel"]: row for row in rows}


@pytest.mark.parametrize(
    ("arch", "nvcc"),
    [
        *(pytest.param(arch, NVCC, marks=pytest.mark.slow) for arch in ("sm_90", "sm_80")),
        *(pytest.param(arch, None, marks=pytest.mark.slow) for arch in (("sm_90", "sm_80") if NVCC else ())),  # by NVRTC, as users have it
    ],
)
def test_every_kernel_passes(arch, nvcc, tmp_path):
    rows = compiled(arch, nvcc, tmp_path)
    assert set(rows) == EXPECTED
    assert [row["faults"] for row in rows.values() if row["faults"]] == []
    for name, row in rows.items():
        assert row["spills"] == 0
        assert row["registers"] <= 64, row
        if row["declares"] == "wide_loads":
            assert row["loads_128"] >= 1, row
        if name.startswith("patches.cu:patches"):
            assert row["stores_128"] >= 1, row
        if name.endswith(("_16", "_32")):
            assert row["ctas_per_sm"] >= 6, "enough bytes are under way to fill the memory's latency"
    again = aot.cuda_sources(arch, tmp_path, nvcc)
    assert {row["kernel"]: row for row in again} == rows, "remembered"


def test_what_does_not_compile_is_a_fault(monkeypatch, tmp_path):
    if NVCC is None and nvrtc.library() is None:
        pytest.skip(aot.cuda_sources("sm_90", tmp_path, None)[0]["skipped"])
    monkeypatch.setattr(kernels, "source", lambda: 'extern "C" __global__ void broken() { nothing; }\n')
    for nvcc in {NVCC, None} if nvrtc.library() else {NVCC}:
        (row,) = aot.cuda_sources("sm_90", tmp_path, nvcc)
        (fault,) = row["faults"]
        assert fault.startswith("patches.cu does not compile for sm_90: ")
        assert '"nothing" is undefined' in fault


def test_a_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    (row,) = aot.cuda_sources("sm_90", tmp_path, None)
    assert row["skipped"].startswith("neither nvcc nor NVRTC is here: install the CUDA toolkit")
    assert row["faults"] == []


def test_a_strip_fits_the_smallest_chip():
    assert min(chip["shared"] for chip in aot.CHIPS.values()) >= kernels.LARGEST_STRIP
