"""A safetensors file, looked at before it is read: its header is what somebody claims."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fastidc.errors import FastidcError
from fastidc.files import open_plain, parse_json
from fastidc.host import available_bytes

LARGEST_HEADER = 16 << 20
"""Bytes. The header of ViT-L/14 with its captioner has less than 0.1 MB; the format itself allows 100 MB."""
MOST_TENSORS = 1 << 16  # ViT-L/14 with its captioner has about 600
_BYTES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}
_SIZES = {dtype: size for size, dtypes in _BYTES.items() for dtype in dtypes}


def damaged(path: Path, reason: str) -> FastidcError:
    """The sentence for a checkpoint file of which ``reason`` is wrong."""
    return FastidcError(f"{path}: cannot be read as a checkpoint ({reason[:200]}); is the file whole? Fetch or write it again.")


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, once `check_header` has passed it. FastidcError for one that is damaged, or larger than the
    memory that is free."""
    from safetensors.torch import load_file

    try:
        check_room(path, check_header(path))
        return load_file(path)
    except FastidcError:
        raise
    except Exception as error:  # the system's and the library's
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from None


def check_room(path: Path, needed: int) -> None:
    """FastidcError where ``needed`` bytes are more than the memory that is free."""
    free = available_bytes()
    if free is not None and needed > free:
        raise FastidcError(f"{path}: holds {needed / 1e9:,.1f} GB of tensors, and {free / 1e9:,.1f} GB of memory are free; make room.")


def check_header(path: Path) -> int:
    """The bytes of all tensors of a safetensors file, nothing of them read; FastidcError unless its header has distinct names, known types and
    shapes, and tensors that fill the file one after another."""
    with open_plain(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged(path, f"it has {size:,} bytes and says that its header has {length:,}")
        if length > LARGEST_HEADER:
            raise damaged(path, f"its header has {length:,} bytes, more than the {LARGEST_HEADER:,} that are read")
        header = file.read(length)
    try:
        table = parse_json(header.decode(), _distinct)
    except ValueError as error:  # no UTF-8, no JSON, a name that stands twice
        raise damaged(path, f"its header is no JSON of distinct names: {error}") from None
    if not isinstance(table, dict):
        raise damaged(path, "its header is no JSON object")
    table.pop("__metadata__", None)
    if len(table) > MOST_TENSORS:
        raise damaged(path, f"its header names {len(table):,} tensors, more than the {MOST_TENSORS:,} that are read")
    end = 0
    for name, begin, stop in sorted((_placed(path, name, facts) for name, facts in table.items()), key=lambda place: place[1:]):
        if begin != end:
            raise damaged(path, f"tensor {_shown(name)} begins at byte {begin:,} of the data, and {end:,} was expected")
        end = stop
    if end != size - 8 - length:
        raise damaged(path, f"its tensors have {end:,} bytes, and {size - 8 - length:,} follow its header")
    return end


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{_shown(twice)} stands twice")
    return table


def _placed(path: Path, name: str, facts: Any) -> tuple[str, int, int]:
    """(name, where it begins, where it ends) of a tensor whose own facts agree with each other."""
    facts = facts if isinstance(facts, dict) else {}
    dtype, shape, place = (facts.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise damaged(path, f"tensor {_shown(name)} has the dtype {_shown(dtype)}, which is unknown")
    if not _is_counts(shape) or not _is_counts(place) or len(place) != 2:
        raise damaged(path, f"tensor {_shown(name)} has no shape and place of whole numbers from 0")
    if place[1] - place[0] != math.prod(shape) * _SIZES[dtype]:
        raise damaged(path, f"tensor {_shown(name)} has shape {_shown(shape)} of {dtype} and lies from byte {place[0]:,} to {place[1]:,}")
    return name, place[0], place[1]


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(x) is int and 0 <= x < 1 << 62 for x in value)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
