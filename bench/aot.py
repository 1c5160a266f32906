"""`python -m bench.aot --arch sm_90 --json FILE`: what the compilers make of every kernel, with no GPU.

Compilation alone checks nothing: it spills, and it asks for more shared memory than a chip has, without an error. So the machine code is
taken apart: registers, spills, shared memory, tensor-core instructions, 128-bit loads, and how many programs fit a multiprocessor.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import nvrtc
from bench.arguments import Parser, answered
from bench.kernels import COMPILATIONS, Compilation
from fastidc.errors import FastidcError
from fastidc.files import write_json

LIMIT = 40  # compilations of one run without --all: the gate is part of the tests
# Per architecture: bytes of shared memory that one program may have, and that a multiprocessor has; its registers, warps and programs.
CHIPS = {
    "sm_80": {"capability": 80, "shared": 166_912, "shared_total": 167_936, "registers": 65_536, "warps": 64, "programs": 32},
    "sm_90": {"capability": 90, "shared": 232_448, "shared_total": 233_472, "registers": 65_536, "warps": 64, "programs": 32},
}
_RESERVED_SHARED = 1024  # which the driver takes of each program


def compile_one(entry: Compilation, arch: str) -> dict:
    """One row: kernel, config, registers, spills, shared_bytes, mma, loads_128, ctas_per_sm, faults (sentences; none is a pass)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = CHIPS[arch]
    module, _, function = entry.kernel.partition(":")
    jit = getattr(importlib.import_module(module), function)
    names = list(entry.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in entry.divisible}
    constants = {(names.index(name),): value for name, value in entry.constants.items()}
    source = ASTSource(fn=jit, signature=dict(entry.signature), constexprs=constants, attrs=attributes)
    options = {"num_warps": entry.warps, "num_stages": entry.stages, "enable_fp_fusion": True}  # as the launchers ask
    compiled = triton.compile(source, target=GPUTarget("cuda", chip["capability"], 32), options=options)
    found = _inspect(compiled.asm["cubin"])
    row = {
        "kernel": entry.name,
        "config": entry.config,
        "arch": arch,
        "warps": entry.warps,
        "stages": entry.stages,
        "registers": found["registers"],
        "spills": found["spills"],
        "shared_bytes": compiled.metadata.shared,
        "mma": found["mma"],
        "loads_128": found["loads_128"],
        "ctas_per_sm": resident(chip, found["registers"], compiled.metadata.shared, entry.warps),
        "declares": entry.declares,
        "triton": triton.__version__,
    }
    return {**row, "faults": faults(row)}


def resident(chip: dict, registers: int, shared: int, warps: int) -> int:
    """Programs that one multiprocessor holds at a time; 0 where not even one fits."""
    per_warp = math.ceil(registers * 32 / 256) * 256  # registers are given out in blocks of 256 a warp
    by_registers = chip["registers"] // (per_warp * warps) if registers else chip["programs"]
    by_shared = chip["shared_total"] // (shared + _RESERVED_SHARED)
    return min(by_registers, by_shared, chip["warps"] // warps, chip["programs"])


def faults(row: dict) -> list[str]:
    """Why a row may not pass: one sentence each."""
    out, name = [], f"{row['kernel']} ({row['config']}, {row['arch']})"
    if row["spills"]:
        out.append(f"{name} spills {row['spills']} bytes a thread; give it more warps or a smaller tile.")
    limit = CHIPS[row["arch"]]["shared"]
    if row["shared_bytes"] > limit:
        out.append(
            f"{name} needs {row['shared_bytes']} bytes of shared memory, and a program may have {limit}; fewer stages or a smaller tile."
        )
    if row["declares"] == "mma" and not row["mma"]:
        out.append(f"{name} declares a product on tensor cores, and its code has no HMMA or HGMMA.")
    if row["declares"] == "wide_loads" and not row["loads_128"]:
        out.append(f"{name} declares 128-bit loads, and its code has none; are its pointers and strides declared divisible by 16?")
    return out


def _inspect(cubin: bytes) -> dict:
    """Registers, bytes of spills, the kind of tensor-core instruction (or None) and the numbers of 128-bit loads and stores, of a file's one
    kernel."""
    return next(iter(_inspect_each(cubin).values()))


def _inspect_each(cubin: bytes) -> dict[str, dict]:
    """`_inspect` of every kernel by its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _by_kernel(r"Function (\w+):", _cuobjdump("--dump-resource-usage", path))
        code = _by_kernel(r"Function : (\w+)", _cuobjdump("-sass", path))
    return {name: _facts(usage[name], code[name]) for name in usage}


def _by_kernel(heading: str, text: str) -> dict[str, str]:
    _, *parts = re.split(heading, text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _facts(usage: str, code: str) -> dict:
    registers = max((int(n) for n in re.findall(r"\bREG:(\d+)", usage)), default=0)
    stack = max((int(n) for n in re.findall(r"\bSTACK:(\d+)", usage)), default=0)
    local = max((int(n) for n in re.findall(r"\bLOCAL:(\d+)", usage)), default=0)
    spilling = re.search(r"\b(LDL|STL)\b", code) is not None
    kinds = [kind for kind in ("HGMMA", "QGMMA", "IMMA", "HMMA") if re.search(rf"\b{kind}\b", code)]
    wide = len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128\b", code)) + len(re.findall(r"\bUTMALDG\b", code))
    return {
        "registers": registers,
        "spills": max(stack, local) if spilling else 0,
        "mma": {"HGMMA": "wgmma", "QGMMA": "wgmma", "HMMA": "mma.sync", "IMMA": "mma.sync"}[kinds[0]] if kinds else None,
        "loads_128": wide,
        "stores_128": len(re.findall(r"\bSTG\.\S*128\b", code)),
    }


def _cuobjdump(flag: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(tool), flag, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FastidcError(
            f"{tool.name} {flag} failed: {done.stderr.strip().splitlines()[0] if done.stderr.strip() else 'without a word'}."
        )
    return done.stdout


def cached(entry: Compilation, arch: str, folder: Path) -> dict:
    """`compile_one`, remembered by the kernel's source file, the entry and Triton's version."""
    import triton

    module = importlib.import_module(entry.kernel.partition(":")[0])
    facts = [inspect.getsource(module), Path(__file__).read_text(), repr(entry), arch, triton.__version__]
    path = folder / f"{hashlib.blake2b(chr(0).join(facts).encode(), digest_size=16).hexdigest()}.json"
    if path.is_file():
        return json.loads(path.read_text())
    row = compile_one(entry, arch)
    write_json(path, row)
    return row


def cuda_sources(arch: str, folder: Path, nvcc: str | None) -> list[dict]:
    """One row for each CUDA C++ kernel, compiled by nvcc, else by NVRTC, else why not. What does not compile is a fault."""
    from fastidc_kernels import patches as kernels

    compiler = f"nvcc {nvcc}" if nvcc else f"nvrtc {nvrtc.version()}" if nvrtc.library() else None
    row = {"kernel": "patches.cu", "config": (compiler or "").partition(" ")[0], "arch": arch, "faults": []}
    if compiler is None:
        return [
            {**row, "skipped": "neither nvcc nor NVRTC is here: install the CUDA toolkit, or torch for CUDA, whose wheels bring NVRTC."}
        ]
    facts = [kernels.source(), Path(__file__).read_text(), arch, compiler]
    path = folder / f"{hashlib.blake2b(chr(0).join(facts).encode(), digest_size=16).hexdigest()}.json"
    if path.is_file():
        return json.loads(path.read_text())
    try:
        options = (*kernels.OPTIONS, f"-arch={arch}")
        cubin = nvrtc.cubin_of_nvcc(nvcc, kernels.source(), options) if nvcc else nvrtc.cubin(kernels.source(), options)
    except FastidcError as error:
        return [{**row, "faults": [f"patches.cu does not compile for {arch}: {error}."]}]
    gather = re.compile(rf"patches_(augmented_)?(?:{'|'.join(kernels.SUFFIXES.values())})_({'|'.join(map(str, kernels.PATCH_SIZES))})")
    rows = []
    for name, found in _inspect_each(cubin).items():
        known, warps = gather.fullmatch(name), kernels.THREADS // 32
        shared = 3 * int(known[2]) * 224 if known else 0  # a row of patches of CLIP's images
        facts = {
            "kernel": f"patches.cu:{name}",
            "warps": warps,
            "shared_bytes": shared,
            "ctas_per_sm": resident(CHIPS[arch], found["registers"], shared, warps),
        }
        facts["declares"] = "wide_loads" if known and not known[1] else "nothing"
        rows.append({**row, **found, **facts, "faults": faults({**row, **found, **facts})})
    write_json(path, rows)
    return rows


def gate(entries: Sequence[Compilation], arch: str, folder: Path, nvcc: str | None = None) -> list[dict]:
    """All rows; needs a process whose Triton is not the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise FastidcError("TRITON_INTERPRET is set, so there is nothing to compile; run bench.aot in a process of its own without it.")
    return [cached(entry, arch, folder) for entry in entries] + cuda_sources(arch, folder, nvcc)


def main(argv: Sequence[str] | None = None, entries: Sequence[Compilation] = COMPILATIONS) -> int:
    """Exit code 0, 1 where a kernel fails its gate, 2 for a bad call."""
    return answered("bench.aot", lambda: run(_parse(argv), entries))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m bench.aot", description="Compile every kernel without a GPU and look at its machine code.")
    p.add_argument("--arch", choices=sorted(CHIPS), default="sm_90")
    p.add_argument("--json", type=Path, help="write the rows here")
    p.add_argument("--all", action="store_true", help="every tile, not only the paper's shapes")
    p.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / f"fastidc-aot-{os.getuid()}", help="folder of what was compiled before"
    )
    return p.parse_args(argv)


def run(args: argparse.Namespace, entries: Sequence[Compilation]) -> int:
    chosen = [entry for entry in entries if entry.arch in (None, args.arch) and (args.all or entry.paper)]
    if not args.all:
        if len(chosen) > LIMIT:
            print(f"{len(chosen) - LIMIT} of {len(chosen)} compilations are left out; --all makes them too.")
        chosen = chosen[:LIMIT]
    rows = gate(chosen, args.arch, args.cache, shutil.which("nvcc"))
    if args.json:
        write_json(args.json, rows)
    for row in rows:
        shown = ("registers", "spills", "shared_bytes", "mma", "loads_128", "ctas_per_sm")
        facts = ", ".join(f"{name} {row[name]}" for name in shown if name in row) or row.get("skipped", "")
        print(f"{row['kernel']} [{row['config']}] {row['arch']}: {facts}")
    broken = [sentence for row in rows for sentence in row["faults"]]
    for sentence in broken:
        print(f"bench.aot: {sentence}", file=sys.stderr)
    if not rows:
        print("no kernel to compile yet.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
