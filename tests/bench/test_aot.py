"""The ahead-of-time gate: on the kernels there are, and on toys that are each bad in one way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot
from bench.kernels import COMPILATIONS

ROOT = Path(__file__).parents[2]


def run(*command):
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests/bench"))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_every_kernel_passes(arch, tmp_path):
    done = run("-m", "bench.aot", "--arch", arch, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    here = sum(entry.paper and entry.arch in (None, arch) for entry in COMPILATIONS)
    assert len(rows) >= min(here, aot.LIMIT)
    attention = {
        (row["kernel"].removeprefix("attention_"), row["config"].partition(" D=")[0]): row
        for row in rows
        if row["kernel"].startswith("attention")
    }
    # one program loads while others compute: what the memory-bound kernels were cut for
    programs = {("fwd", "intra L=50"): 4, ("bwd", "intra L=50"): 3, ("fwd", "inter L=100"): 2, ("bwd", "inter L=100"): 2}
    for key, least in programs.items():
        assert attention[key]["ctas_per_sm"] >= least, attention[key]
        assert attention[key]["mma"] == ("wgmma" if arch == "sm_90" else "mma.sync")
    for row in attention.values():
        assert row["loads_128"] > 0, row
    products = [row for row in rows if row["kernel"] in ("info_nce_fwd", "info_nce_bwd")]
    assert {row["config"].partition(" bf16")[0] for row in products} >= {"B=128 D=512", "B=16384 D=512", "B=16384 D=768"}
    for row in products:
        assert row["loads_128"] > 0, row
        large = not row["config"].startswith("B=128 ")
        assert row["mma"] == ("wgmma" if arch == "sm_90" and large else row["mma"]), row


@pytest.mark.slow
def test_the_gate_finds_what_is_wrong(tmp_path):
    done = run(ROOT / "tests/bench/run_aot.py", tmp_path / "rows.json", "sm_90")
    assert done.returncode == 1, done.stderr
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    faulty = {name: " ".join(row["faults"]) for name, row in rows.items() if row["faults"]}
    assert set(faulty) == {"narrow", "no_tensor_cores", "spilling", "greedy"}, faulty
    assert "128-bit loads" in faulty["narrow"]
    assert "has no HMMA or HGMMA" in faulty["no_tensor_cores"]
    assert "spilling (toy, sm_90) spills" in faulty["spilling"]
    assert "bytes of shared memory, and a program may have 232448" in faulty["greedy"]
    assert rows["product"]["mma"] == "wgmma"
    assert rows["copy"]["loads_128"] > 0
    assert rows["product"]["registers"] > 0
    assert rows["product"]["ctas_per_sm"] >= 1
    for sentence in (sentence for row in rows.values() for sentence in row["faults"]):
        assert sentence in done.stderr
    keys = {"kernel", "config", "registers", "spills", "shared_bytes", "mma", "loads_128", "ctas_per_sm"}
    assert all(keys <= set(row) for row in rows.values())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    run(ROOT / "tests/bench/run_aot.py", tmp_path / "rows.json", "sm_90")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}, "the second time nothing is compiled"


def test_programs_that_fit_a_multiprocessor():
    hopper = aot.CHIPS["sm_90"]
    assert aot.resident(hopper, registers=75, shared=24 << 10, warps=4) == 6  # 80 registers a thread x 128 threads x 6 = 61,440
    assert aot.resident(hopper, registers=32, shared=100_000, warps=4) == 2
    assert aot.resident(hopper, registers=255, shared=0, warps=16) == 0
    assert aot.resident(hopper, registers=16, shared=0, warps=2) == 32


def test_a_bad_call_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    assert aot.main(["--arch", "sm_70"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.aot: argument --arch: invalid choice: 'sm_70'")
    assert len(err.splitlines()) == 1
