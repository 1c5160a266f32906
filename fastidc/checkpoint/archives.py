"""Archives that torch wrote, looked at before anybody reads them, and TorchScript's read without torch.

OpenAI's downloads are TorchScript, which is a program: ``torch.jit.load`` runs the ``__setstate__`` of its modules, and one of those can write
files. So their tensors are read here: `pickletools` says which opcodes there are, and those that build modules and tensors are followed. No
other has a meaning, and no name is looked up.
"""

import math
import pickletools
import re
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fastidc.checkpoint.header import MOST_TENSORS, check_room, damaged
from fastidc.errors import FastidcError

SPARE = 64 << 20
"""Bytes that an archive may unpack to beyond its own size: torch stores tensors as they are."""
LONGEST_NAME = 1000  # of a class, with its module
LEGACY_PICKLES = 5
"""Those that a file of torch before 1.6 begins with: a number, a version, the system, the tensors, and the names of their storages."""
LARGEST_PICKLE = 64 << 20  # of the names and shapes; that of ViT-L/14 has about 0.1 MB
_DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


def check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """FastidcError where names leave the archive's folder or stand twice, or where it claims to unpack to more than it can hold."""
    seen: set[str] = set()
    size = path.stat().st_size
    for member in archive.infolist():
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        if (
            ".." in parts
            or parts[:1] == ("/",)
            or (parts and re.fullmatch("[A-Za-z]:", parts[0]))
            or member.orig_filename != member.filename
        ):
            raise damaged(path, f"its member {member.orig_filename[:80]!r} would leave the archive's folder")
        if member.filename in seen:
            raise damaged(path, f"its member {member.filename[:80]!r} stands twice")
        seen.add(member.filename)
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > size + SPARE:
        raise damaged(path, f"its members claim {unpacked:,} bytes in a file of {size:,}")


def check_pickles(path: Path, file: IO[bytes], count: int = 1) -> None:
    """FastidcError unless ``file`` goes on with ``count`` pickles whose names are of usual length: over a long one torch makes a sentence for
    minutes. Nothing is unpickled."""
    try:
        for _ in range(count):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST") and len(argument) > LONGEST_NAME:
                    raise damaged(path, f"its pickle has a name of {len(argument):,} signs")
    except FastidcError:
        raise
    except Exception as error:
        raise damaged(path, f"it is nothing that torch.save writes: {' '.join(str(error).split())[:100]}") from None


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Dotted name -> tensor, on the CPU, of a TorchScript archive's modules; FastidcError for one that says more than `torch.jit.save` writes of
    modules and tensors. `check_members` comes first."""
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    members = {member.filename: member for member in archive.infolist()}
    pickled = members.get(f"{root}data.pkl")
    if pickled is None or pickled.file_size > LARGEST_PICKLE:
        raise damaged(path, "it has no data.pkl of a TorchScript archive")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder").decode("ascii", "replace") != sys.byteorder:
        raise damaged(path, "it was written on a machine of the other byte order")
    try:
        found = _named(_follow(archive.read(pickled)))
        sizes = {tensor.storage.key: members[f"{root}data/{tensor.storage.key}"].file_size for tensor in found.values()}
        for name, tensor in found.items():
            tensor.check(name, sizes[tensor.storage.key])
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # opcodes out of their order
        raise damaged(path, f"its data.pkl is not that of a module: {type(error).__name__}: {error}") from None
    check_room(path, sum(sizes.values()))
    stored = {key: bytearray(archive.read(f"{root}data/{key}")) for key in sizes}
    return {name: tensor.of(stored[tensor.storage.key]) for name, tensor in found.items()}


class _Name(NamedTuple):
    """A global's name, which stands for nothing but itself."""

    module: str
    name: str


@dataclass(eq=False)
class _Module:
    held: dict[str, Any] = field(default_factory=dict)


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self, name: str, size: int) -> None:
        """ValueError unless it lies in its storage of ``size`` bytes, and has no more numbers than that."""
        numbers = (self.storage.count, self.offset, *self.shape, *self.stride)
        fits = all(type(x) is int and 0 <= x < 1 << 62 for x in numbers) and len(self.shape) == len(self.stride) <= 64
        if not fits or self.storage.count * self.storage.dtype.itemsize != size:
            raise ValueError(f"tensor {name[:80]} does not fit the {size:,} bytes of its storage")
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if count > self.storage.count or (count and last >= self.storage.count):
            raise ValueError(f"tensor {name[:80]} reaches beyond its storage")

    def of(self, stored: bytearray) -> Tensor:
        if not stored:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        return torch.frombuffer(stored, dtype=self.storage.dtype).as_strided(self.shape, self.stride, self.offset)


_MARK, _NOTHING = object(), object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _follow(pickled: bytes) -> Any:
    """What the opcodes build of modules, tensors and plain values; ValueError for an opcode that TorchScript does not write."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(_MARK)
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "TUPLE":
                taken = to_mark()
                stack.append(tuple(taken))
            case "GLOBAL":
                stack.append(_Name(*argument.rsplit(" ", 1)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, made_by = stack.pop(), stack.pop()
                stack.append(_made(made_by, arguments))
            case "NEWOBJ":
                del stack[-2:]
                stack.append(_Module())
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Module) or not isinstance(state, dict):
                    raise ValueError("it holds a module that restores itself by code of its own, which is not run")
                stack[-1].held.update(state)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                stack[-1].update(_items([key, value]))
            case "SETITEMS":
                taken = to_mark()
                stack[-1].update(_items(taken))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                taken = to_mark()
                stack[-1].extend(taken)
            case name:
                raise ValueError(f"the opcode {name} is none of TorchScript's")
    raise ValueError("it has no end")


def _items(taken: list[Any]) -> dict[str, Any]:
    """Keys and values in turn; ValueError for a key that is no text: hashing tuples nested deep enough ends Python itself."""
    if not all(isinstance(key, str) for key in taken[::2]):
        raise ValueError("it has a key that is no text")
    return dict(zip(taken[::2], taken[1::2], strict=True))


def _storage(said: Any) -> _Storage:
    kind, type_, key, _, count = said
    if kind != "storage" or not isinstance(type_, _Name) or not isinstance(key, str) or not key.isalnum():
        raise ValueError("it names a storage that is none")
    return _Storage(_DTYPES[type_.name], key, count)


def _made(by: Any, arguments: Any) -> Any:
    """A tensor or an empty dictionary; anything else, such as a list of numbers or a device, is no weight and stays unknown."""
    if by == _Name("torch._utils", "_rebuild_tensor_v2"):
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise ValueError("it builds a tensor of no storage")
        return _Tensor(storage, offset, shape, stride)
    return {} if by == _Name("collections", "OrderedDict") else _NOTHING


def _named(module: Any) -> dict[str, _Tensor]:
    """Dotted name -> tensor, a module's own before those of the modules in it."""
    if not isinstance(module, _Module):
        raise ValueError("it is no module")
    out: dict[str, _Tensor] = {}
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, one = waiting.pop()
        seen += 1
        if seen > MOST_TENSORS or len(out) > MOST_TENSORS or prefix.count(".") > 64:  # a module may hold itself
            raise ValueError(f"it has more than {MOST_TENSORS:,} modules or tensors")
        out |= {f"{prefix}{name}": value for name, value in one.held.items() if isinstance(value, _Tensor)}
        inner = [(f"{prefix}{name}.", value) for name, value in one.held.items() if isinstance(value, _Module)]
        waiting += reversed(inner)
    return out
