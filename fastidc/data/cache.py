"""The cache: every image of a data set decoded and squashed once, in one file that is mapped into memory and never read whole.

The file, all numbers little-endian:

    0      header, 4,096 bytes: magic "FASTIDC\\0", version (uint32), finished (uint32, 0 or 1), images I (uint64), height H, width W
           (uint32 each), start and length of the index (uint64 each), BLAKE2b-256 of the index (32 bytes), zeros; its last 32 bytes are
           the BLAKE2b-256 of the 4,064 before them
    4096   pixels: uint8 [I, H, W, 3], RGB, row after row, image after image
    then   index: UTF-8 JSON {"builder", "dataset", "root", "built", "fields", "images"}, a list of ``fields`` for every image; of a cache
           that Pillow has not built also "difference": how far its pixels are from Pillow's, see `fastidc.data.cache_builders`

An image is known by its path relative to the data set's folder, and carries its file's size, mtime and BLAKE2b-128, its own width and
height, the CRC-32 of its pixels and a verdict ("ok", or why it cannot be used). Images lie in the order in which the records name them, so
that the images of a scene are neighbours. `fastidc.data.cache_build` writes the file.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastidc.data import cache_builders as builders
from fastidc.errors import FastidcError
from fastidc.host import cores

MAGIC = b"FASTIDC\0"
VERSION = 1
HEADER_BYTES = 4096
_DIGEST_BYTES = 32
_HEADER = struct.Struct("<8sIIQIIQQ32s")


@dataclass(frozen=True)
class Entry:
    """What the index knows of an image."""

    path: str  # relative to the data set's folder, with "/"
    bytes: int
    mtime_ns: int
    digest: str  # BLAKE2b-128 of the file, hexadecimal
    width: int
    height: int
    crc32: int  # of the pixels in the cache
    verdict: str = "ok"


ENTRY_FIELDS = tuple(field.name for field in fields(Entry))


@dataclass(frozen=True)
class Header:
    finished: bool
    images: int
    height: int
    width: int
    index_start: int
    index_bytes: int
    index_digest: bytes

    def pack(self) -> bytes:
        """uint8 [4096]"""
        values = (self.images, self.height, self.width, self.index_start, self.index_bytes, self.index_digest)
        page = _HEADER.pack(MAGIC, VERSION, int(self.finished), *values).ljust(HEADER_BYTES - _DIGEST_BYTES, b"\0")
        return page + digest_of(page, _DIGEST_BYTES)

    @classmethod
    def unpack(cls, page: bytes, path: Path) -> "Header":
        if not page.startswith(MAGIC[: max(1, len(page))]):
            raise FastidcError(f"{path}: is no cache of fastidc; name another file, or make one with `fastidc cache build`.")
        if len(page) < HEADER_BYTES:
            raise damaged(path, f"it ends after {len(page)} bytes, within its header")
        body, seal = page[:-_DIGEST_BYTES], page[-_DIGEST_BYTES:]
        if digest_of(body, _DIGEST_BYTES) != seal:
            raise damaged(path, "its header does not have the checksum that it names")
        _, version, finished, *values = _HEADER.unpack_from(body)
        if version != VERSION:
            raise FastidcError(
                f"{path}: is a cache of format {version}, and this fastidc reads format {VERSION}; delete it and build it anew with "
                "`fastidc cache build`."
            )
        return cls(bool(finished), *values)


def damaged(path: Path, what: str) -> FastidcError:
    return FastidcError(f"{path}: a damaged cache, {what}; build it anew with `fastidc cache build`.")


def digest_of(data: bytes, size: int = 16) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def default_path(root: str | Path, size: int) -> Path:
    """Where a cache lies that nobody has named: in the data set's folder."""
    return folder_of(root) / f"fastidc-cache-{size}.bin"


def folder_of(root: str | Path) -> Path:
    """The folder that paths in a cache are relative to: the data set's, or that of its table."""
    root = Path(root)
    return root if root.is_dir() else root.parent


def relative_names(root: str | Path, paths: Iterable[Path]) -> Iterator[str]:
    """Each path as a cache knows it; images may lie outside the folder."""
    folder = os.path.abspath(folder_of(root))
    prefix = folder.rstrip(os.sep) + os.sep
    for path in paths:
        full = os.path.abspath(path)
        name = full[len(prefix) :] if full.startswith(prefix) else os.path.relpath(full, folder)
        yield name.replace(os.sep, "/")


def unchanged(entry: Entry, path: Path) -> bool:
    """Whether the image at ``path`` is the one that ``entry`` was made of. Its content is read only where its mtime differs."""
    try:
        stat = path.stat()
        if stat.st_size != entry.bytes:
            return False
        return stat.st_mtime_ns == entry.mtime_ns or digest_of(path.read_bytes()).hex() == entry.digest
    except OSError:
        return False


class Cache:
    """A finished cache: its index, and its pixels mapped into memory, uint8 [I, H, W, 3], read-only. Any number of processes may read one.

    FastidcError where the file is absent, foreign, unfinished, damaged in header or index, or not as long as it says. The pixels have
    checksums of their own, which `damaged_pixels` compares.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        try:
            with path.open("rb") as file:
                self.header = header = Header.unpack(file.read(HEADER_BYTES), path)
                length = os.fstat(file.fileno()).st_size
                expected = header.index_start + header.index_bytes
                if not header.finished:
                    raise FastidcError(f"{path}: a cache whose build has not finished; `fastidc cache build` goes on with it.")
                if length != expected:
                    raise damaged(path, f"{length:,} bytes long instead of {expected:,}")
                file.seek(header.index_start)
                index = file.read(header.index_bytes)
                if digest_of(index, _DIGEST_BYTES) != header.index_digest:
                    raise damaged(path, "its index does not have the checksum that its header names")
                self.about, self.entries = _read_index(index)
                shape = (header.images, header.height, header.width, 3)
                # of the open file: another cache may be moved to this path meanwhile
                self.pixels = np.memmap(file, np.uint8, "r", HEADER_BYTES, shape)
        except FileNotFoundError:
            raise FastidcError(f"{path}: no such cache; make it with `fastidc cache build --data DATA --out {path} --size SIZE`.") from None
        except OSError as error:
            raise FastidcError(f"{path}: cannot be read ({error.strerror or error}); name another cache.") from None
        self.size = header.height

    def rows(self, root: str | Path, paths: Sequence[Path]) -> dict[Path, int]:
        """Path -> row of ``pixels``. FastidcError names the first path that this cache does not hold, or holds as unusable."""
        known = {entry.path: row for row, entry in enumerate(self.entries)}
        found = {path: known.get(name, -1) for path, name in zip(paths, relative_names(root, paths), strict=True)}
        missing = [path for path, row in found.items() if row < 0]
        if missing:
            more = f" nor {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise FastidcError(
                f"{self.path}: does not hold {missing[0]}{more}; {self._again(root)}, or read the images with --loader pillow."
            )
        for path, row in found.items():
            if self.entries[row].verdict != "ok":
                raise FastidcError(f"{path}: {self.path} could not be made of it ({self.entries[row].verdict}); replace the file.")
        return found

    def check_fresh(self, root: str | Path, rows: dict[Path, int], workers: int = 4) -> None:
        """FastidcError where an image is another one than it was when the cache was built."""
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            same = pool.map(lambda item: unchanged(self.entries[item[1]], item[0]), rows.items())
            progress = tqdm(zip(rows, same, strict=True), total=len(rows), desc="check cache", unit="image", leave=False, delay=1)
            changed = [path for path, good in progress if not good]
        if changed:
            more = f" and {len(changed) - 1:,} more have" if len(changed) > 1 else " has"
            raise FastidcError(
                f"{self.path}: {changed[0]}{more} changed since it was built; {self._again(root)}, which decodes only what changed, or read "
                "the images with --loader pillow."
            )

    def _again(self, root: str | Path) -> str:
        return f"build it anew with `fastidc cache build --data {root} --size {self.size} --out {self.path}`"

    def damaged_pixels(self) -> list[str]:
        """Paths of the images whose pixels do not have their checksum; reads the whole file."""
        with ThreadPoolExecutor(max_workers=cores()) as pool:
            sums = pool.map(lambda row: zlib.crc32(self.pixels[row]), range(len(self.entries)))
            progress = tqdm(zip(self.entries, sums, strict=True), total=len(self.entries), desc="verify", unit="image", leave=False)
            return [entry.path for entry, value in progress if value != entry.crc32]

    def notes(self) -> list[str]:
        """What a reader should know of its pixels, in sentences."""
        measured, other = self.about.get("difference"), builders.other_pillow(self.about["builder"])
        built = (
            f"It was built by {self.about['builder']['name']}: next to Pillow {builders.difference_said(measured)}." if measured else None
        )
        return [note for note in (built, other) if note]

    def describe(self) -> str:
        """What `fastidc cache info` prints."""
        widths = {(entry.width, entry.height) for entry in self.entries}
        sizes = " ".join(f"{width}x{height}" for width, height in sorted(widths)[:4]) + (" ..." if len(widths) > 4 else "")
        lines = {
            "cache": f"{self.path}, format {VERSION}",
            "images": f"{len(self.entries):,} of {self.header.width} x {self.header.height}, uint8 RGB",
            "bytes": f"{self.header.index_start + self.header.index_bytes:,}",
            "made from": f"{self.about['root']} ({self.about['dataset']}), {sum(e.bytes for e in self.entries):,} bytes, {sizes}",
            "builder": builders.said(self.about["builder"]),
            "built": self.about["built"],
        }
        if "difference" in self.about:
            lines["vs Pillow"] = builders.difference_said(self.about["difference"])
        if other := builders.other_pillow(self.about["builder"]):
            lines["note"] = other
        return "\n".join(f"{name + ':':<11}{value}" for name, value in lines.items())


def write_index(about: dict[str, Any], entries: Sequence[Entry]) -> bytes:
    value = {**about, "fields": ENTRY_FIELDS, "images": [astuple(entry) for entry in entries]}
    return json.dumps(value, separators=(",", ":")).encode()


def _read_index(index: bytes) -> tuple[dict[str, Any], list[Entry]]:
    """``index`` has its checksum, so it is what `write_index` wrote."""
    about = json.loads(index)
    return about, [Entry(*values) for values in about.pop("images")]
