"""The CUDA C++ kernels of cuda/patches.cu, through CuPy: patches of stored images, and pictures squashed to one size.

    patches(images, index, parameters, patch_size, dtype, faults) -> [K, n, 3*P*P]
    squash(pictures, size, rows_first) -> [K, S, S, 3]

The fatbin that CMake built of this very source is loaded where it is packaged, else NVRTC compiles the source, which CuPy keeps for later
processes. The first call of a process loads, so a graph is captured after it. Launches go to torch's current stream, with torch's addresses.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastidc_kernels import _launch, _runtime

FOLDER = Path(__file__).parent / "cuda"
OPTIONS = ("-std=c++17", "-fmad=false")  # nothing fused: patches.cuh promises the same bits on every machine
SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PATCH_SIZES = (14, 16, 32)  # compiled as constants; others share a kernel that divides at run time
LARGEST_STRIP = 160 << 10  # bytes of shared memory: less than sm_80's 163 KiB
THREADS = 256
_WITHOUT_ASKING = 48 << 10  # bytes of shared memory
_TALLEST_GRID = 65_535


def source() -> str:
    """patches.cu with its header in place: one text, so that a cache of what was compiled knows all of it."""
    header = (FOLDER / "patches.cuh").read_text().replace("#pragma once\n", "")
    return (FOLDER / "patches.cu").read_text().replace('#include "patches.cuh"\n', header)


def fatbin() -> Path | None:
    """What CMake built of the source as it is now; its name has the source's hash, as CMakeLists.txt makes it."""
    parts = "".join(hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in ("patches.cuh", "patches.cu"))
    path = FOLDER / f"patches-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.fatbin"
    return path if path.is_file() else None


@functools.cache
def _kernel(name: str):
    return _module().get_function(name)


@functools.cache
def _module():
    built = fatbin()
    return _runtime.cuda_module(path=str(built)) if built else _runtime.cuda_module(code=source(), options=OPTIONS)


def patches(images: Tensor, index: Tensor, parameters: Tensor | None, patch_size: int, dtype: torch.dtype, faults: Tensor) -> Tensor:
    """images uint8 [I, H, W, 3] and index int64 [K], contiguous; parameters fp32 [K, 15] contiguous, or None -> [K, n, 3*P*P] in ``dtype``.

    Patches row by row, each (channel, row, column), values 0 to 255. An index outside of the images gives zeros and raises faults, int32 [1],
    to 2^31 - 1 - its place.
    """
    stored, height, width, _ = images.shape
    strips = len(index) * (height // patch_size)
    out = images.new_empty(len(index), (height // patch_size) * (width // patch_size), 3 * patch_size**2, dtype=dtype)
    if not strips:
        return out
    size = patch_size if patch_size in PATCH_SIZES else "any"
    kernel = _kernel(f"patches_{'augmented_' if parameters is not None else ''}{SUFFIXES[dtype]}_{size}")
    shared = -(-3 * patch_size * width // 16) * 16
    addresses = [0 if x is None else x.data_ptr() for x in (images, index, parameters, out, faults)]
    with _launch.on(images.device), _runtime.on_torch_stream(images.device):
        if shared > _WITHOUT_ASKING:
            kernel.max_dynamic_shared_size_bytes = shared
        grid = (min(strips, 2**31 - 1),)
        kernel(grid, (THREADS,), (*addresses, stored, len(index), height, width, patch_size), shared_mem=shared)
    return out


def squash(pictures: Sequence[Tensor], size: int, rows_first: Sequence[bool]) -> Tensor:
    """pictures: uint8 [H, W, 3] each, of any size and with any strides, on one device -> uint8 [K, size, size, 3], as Pillow's bicubic filter.
    rows_first: for each, whether its height is squashed before its width; what is between is rounded, so the order shows.

    Three launches whatever their number. The host writes their addresses and sizes, so this is not for a captured graph.
    """
    device = pictures[0].device
    table, rows, room = plan(pictures, size, rows_first)
    longest = max(max(x.shape[:2]) for x in pictures)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    new, count = pictures[0].new_empty, len(pictures)
    weights, spans = new(count, 2, room, size, dtype=torch.int32), new(count, 2, 2, size, dtype=torch.int32)
    middle, out = new(rows, size, 3), new(count, size, size, 3)
    tables, facts = (table.data_ptr(), weights.data_ptr(), spans.data_ptr()), (count, size, room)
    tall, block = min(count, _TALLEST_GRID), (THREADS,)
    with _launch.on(device), _runtime.on_torch_stream(device):
        _kernel("squash_weights")((_blocks(count * 2 * size),), block, (*tables, *facts))
        _kernel("squash_columns")((_blocks(longest * size), tall), block, (*tables, middle.data_ptr(), *facts))
        _kernel("squash_rows")((_blocks(size * size * 3), tall), block, (*tables, middle.data_ptr(), out.data_ptr(), *facts))
    return out


def plan(pictures: Sequence[Tensor], size: int, rows_first: Sequence[bool]) -> tuple[Tensor, int, int]:
    """`Picture` of patches.cuh for each, int64 [K, 8] on the host; the rows of all; the most weights that an output pixel has."""
    rows, table = 0, []
    for x, turned in zip(pictures, rows_first, strict=True):
        x = x.transpose(0, 1) if turned else x
        table.append([x.data_ptr(), *x.stride(), *x.shape[:2], rows, int(turned)])
        rows += len(x)
    longest = max(max(x.shape[:2]) for x in pictures)
    return torch.tensor(table, dtype=torch.int64), rows, 2 * -(-2 * max(longest, size) // size) + 1


def _blocks(threads: int) -> int:
    return min(-(-threads // THREADS), 2**31 - 1)
