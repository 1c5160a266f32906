"""Runs the gate on the toy kernels, in a process without the interpreter; writes rows as JSON."""

import sys
from pathlib import Path

from bench import aot
from bench.kernels import Compilation

MATRICES = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "M": "constexpr", "K": "constexpr"}


def entry(name, **options):
    kernel = f"toy_kernels:{options.pop('kernel', name)}"
    base = {"signature": MATRICES, "divisible": ("a", "b", "c"), "config": "toy"}
    return Compilation(name=name, kernel=kernel, **{**base, **options})


COPY = {"signature": {"source": "*fp32", "target": "*fp32", "N": "constexpr"}, "constants": {"N": 1024}, "declares": "wide_loads"}
GREEDY = {"signature": {**MATRICES, "STEPS": "constexpr"}, "constants": {"M": 256, "K": 128, "STEPS": 16}}
ENTRIES = (
    entry("product", constants={"M": 64, "K": 64}),
    entry("copy", **COPY, **{"divisible": ("source", "target")}),
    entry("narrow", **COPY, **{"kernel": "copy", "divisible": ()}),
    entry("no_tensor_cores", **{**COPY, "declares": "mma"}, **{"kernel": "copy", "divisible": ("source", "target")}),
    entry("spilling", constants={"M": 128, "K": 64}, warps=1),
    entry("greedy", **GREEDY, warps=8, stages=4),
)

if __name__ == "__main__":
    out, arch = sys.argv[1:]
    sys.exit(aot.main(["--arch", arch, "--json", out, "--cache", str(Path(out).parent / "cache")], ENTRIES))
