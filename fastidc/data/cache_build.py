"""Building a cache: in parallel, going on where an earlier build stopped, and never half there under its own name.

Beside FILE lie, while it is being built, FILE.partial (the cache to be, its header saying "not finished"), FILE.journal (a line for every
image that is in it) and FILE.lock. What the journal names is believed after the checksum of its pixels only, so a machine that lost its
power costs no more than the images that had not reached the disk. The finished file takes FILE's place in one rename.
"""

import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from fastidc.data import limits
from fastidc.data.cache import Cache, Entry, Header, digest_of, relative_names, unchanged, write_index
from fastidc.data.cache_builders import alike, builder_of, difference, off_by, said, to_compare
from fastidc.data.cache_journal import Plan, each, note, open_journal
from fastidc.data.images import naming
from fastidc.data.patience import Pool, result
from fastidc.errors import FastidcError
from fastidc.files import exclusive, sync_folder
from fastidc.host import cores

_AHEAD = 16  # images a worker, submitted and not yet in the journal


@dataclass(frozen=True)
class Built:
    """What a build did."""

    path: Path
    images: int
    decoded: int  # now; the others were there already
    seconds: float


def build(
    paths: Sequence[Path],
    root: str | Path,
    out: str | Path,
    size: int = 224,
    workers: int | None = None,
    builder: str = "pillow",
    dataset: str = "",
    report: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> Built:
    """Makes the cache ``out`` of the images ``paths`` (distinct), squashed to ``size``; ``root`` is the data set's folder or table.

    Goes on with a build that was interrupted, and takes over what has not changed since from a cache that is there already.
    workers: threads (Pillow frees the interpreter lock while it decodes and resizes); by default one a core. builder: one of `BUILDERS`;
    how far from Pillow's the pixels of another one are is measured and written into the index. report: hears of every image that cannot be
    decoded and of what was found.

    FastidcError where images cannot be decoded (the rest is kept), the disk is full, the folder cannot be written, another process builds the
    same file, ``out`` is no cache, or DALI is asked for and absent.
    """
    if size < 1 or (workers is not None and workers < 1):
        raise FastidcError(f"--{'size' if size < 1 else 'workers'} must be at least 1, got {size if size < 1 else workers}.")
    if not paths:
        raise FastidcError(f"{root}: names no image, so there is nothing to build a cache of.")
    workers = workers or cores()
    decoder = builder_of(builder, size, workers)
    about = {
        "builder": decoder.facts,
        "dataset": dataset,
        "root": str(root),
        "built": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    plan = Plan(Path(out), size, workers, list(relative_names(root, paths)), list(paths), about, decoder, report, progress)
    if plan.out.is_dir():
        raise FastidcError(f"{plan.out}: a folder; name the file with --out.")
    started = time.perf_counter()
    with exclusive(plan.out.with_name(f"{plan.out.name}.lock"), str(plan.out)):
        try:
            decoded = _build(plan)
        except KeyboardInterrupt:
            report(f"{plan.out}: {plan.kept()}")
            raise
        except OSError as error:
            name, reason = error.filename or plan.partial, error.strerror or error
            raise FastidcError(
                f"{name}: cannot be written ({reason}); make room, or choose a folder with room that you may write to with --out; {plan.kept()}"
            ) from error
    return Built(plan.out, len(plan.names), decoded, time.perf_counter() - started)


def _build(plan: Plan) -> int:
    old = _old_cache(plan)
    if old is not None and old.header.images == len(plan.names) and [entry.path for entry in old.entries] == plan.names:
        same = each(plan, lambda row: _as_it_was(old, row, plan.paths[row]), range(len(old.entries)), "check cache")
        if all(same):
            plan.done.update(enumerate(old.entries))
            plan.clear()  # of a build that a rebuilt file has overtaken
            return 0
    file = os.open(plan.partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with open_journal(plan, file) as journal:
            _reserve(plan, file)
            if old is not None:
                _take_over(plan, file, journal, old)
            decoded = _decode(plan, file, journal)
        _finish(plan, file)
    finally:
        os.close(file)
    return decoded


def _as_it_was(old: Cache, row: int, path: Path) -> bool:
    """`unchanged` without a look at the image's content, but with one at its pixels, which a build is to mend."""
    entry = old.entries[row]
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (entry.bytes, entry.mtime_ns) and zlib.crc32(old.pixels[row]) == entry.crc32


def _old_cache(plan: Plan) -> Cache | None:
    """The cache that is at ``out`` already, where its images can be used; FastidcError where it is something else than a cache."""
    if not plan.out.exists():
        return None
    try:
        old = Cache(plan.out)
    except FastidcError as refusal:
        if "is no cache of fastidc" in str(refusal):
            raise FastidcError(f"{plan.out}: exists and is no cache of fastidc; choose another --out, or delete it.") from None
        plan.report(f"{plan.out} is replaced: {refusal}")
        return None
    if old.size != plan.size or alike(old.about["builder"]) != alike(plan.builder.facts):
        plan.report(f"{plan.out} is replaced: it holds images of {old.size} x {old.size} by {said(old.about['builder'])}.")
        return None
    return old


def _reserve(plan: Plan, file: int) -> None:
    """Room for all pixels before the first one is decoded, so that a full disk is known now; the header says "not finished"."""
    if os.fstat(file).st_size > plan.index_start:  # of a build of other images, or one that was killed in its last instant
        os.ftruncate(file, plan.index_start)
    _write(file, Header(False, len(plan.names), plan.size, plan.size, plan.index_start, 0, bytes(32)).pack(), 0)
    if not hasattr(os, "posix_fallocate"):
        os.ftruncate(file, plan.index_start)
        return
    try:
        os.posix_fallocate(file, 0, plan.index_start)
    except OSError as error:
        if not plan.done:
            plan.clear()
        error.filename = plan.partial
        error.strerror = f"{error.strerror}; {plan.index_start:,} bytes are needed"
        raise


def _write(file: int, data, start: int) -> None:
    """All of ``data``, a bytes-like object, at ``start``. Not through a memory map, where a full disk is a signal and not an error."""
    data = memoryview(data).cast("B")
    while len(data):
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def _take_over(plan: Plan, file: int, journal: IO[str], old: Cache) -> None:
    """Copies what ``old`` holds of the images that have not changed."""
    known = {entry.path: row for row, entry in enumerate(old.entries)}
    todo = [(row, known[name]) for row, name in enumerate(plan.names) if name in known and row not in plan.done]

    def copy(pair: tuple[int, int]) -> Entry | None:
        row, source = pair
        entry, pixels, path = old.entries[source], old.pixels[source], plan.paths[row]
        now = path.stat().st_mtime_ns if path.is_file() else 0
        if not unchanged(entry, path) or zlib.crc32(pixels) != entry.crc32:
            return None
        _write(file, pixels, plan.start_of(row))
        return replace(entry, mtime_ns=now)  # else a data set that was copied is read whole whenever somebody asks whether it has changed

    for (row, _), entry in zip(todo, each(plan, copy, todo, "take over"), strict=True):
        if entry is not None:
            note(plan, journal, row, entry)
    plan.report(f"{plan.out}: {len(plan.done):,} of {len(plan.names):,} images are taken from the cache that was there.")


def _decode(plan: Plan, file: int, journal: IO[str]) -> int:
    """Decodes what is not done yet; returns how many images that were. FastidcError after all of them where some could not be."""
    todo = [row for row in range(len(plan.names)) if row not in plan.done]
    parts = [todo[i : i + plan.builder.at_once] for i in range(0, len(todo), plan.builder.at_once)]
    ahead = max(2 * plan.builder.threads, _AHEAD * plan.workers // plan.builder.at_once)
    bad: list[str] = []
    bar = tqdm(total=len(plan.names), initial=len(plan.done), desc="cache", unit="image", smoothing=0.05, disable=not plan.progress)
    with bar, Pool(plan.builder.threads) as pool:
        for rows, entries in _in_order(pool, lambda rows: _some(plan, file, rows), parts, ahead):
            for row, entry in zip(rows, entries, strict=True):
                if isinstance(entry, FastidcError):
                    bad.append(str(entry))
                else:
                    note(plan, journal, row, entry)
                bar.update()
    if len(bad) == 1:
        raise FastidcError(f"{bad[0].removesuffix('.')}; {plan.kept()}")
    if bad:
        for sentence in bad:
            plan.report(sentence)
        raise FastidcError(
            f"{len(bad):,} of {len(plan.names):,} images, named above, cannot be decoded; replace the files or take their pairs out of the "
            f"annotations; {plan.kept()}"
        )
    return len(todo)


def _in_order(pool: Executor, function: Callable, items: Sequence, ahead: int) -> Iterator[tuple]:
    """(item, function(item)), at most ``ahead`` of them on their way, so that an error or an interrupt ends it soon."""
    waiting: deque = deque()
    rest = iter(items)
    try:
        for item in islice(rest, ahead):
            waiting.append((item, pool.submit(function, item)))
        while waiting:
            item, future = waiting.popleft()
            yield item, result(future)
            for following in islice(rest, 1):
                waiting.append((following, pool.submit(function, following)))
    finally:
        for _, future in waiting:
            future.cancel()


def _some(plan: Plan, file: int, rows: Sequence[int]) -> list[Entry | FastidcError]:
    """Decodes images into their places; an OSError that leaves here is the cache's and not an image's."""
    found: dict[int, Entry | FastidcError] = {}
    read: dict[int, tuple[bytes, int]] = {}  # content and mtime
    for row in rows:
        path = plan.paths[row]
        try:
            with naming(path), limits.opened(path) as source:
                stat = os.fstat(source.fileno())  # before its bytes: whoever writes to it now makes it stale
                read[row] = limits.content(source), stat.st_mtime_ns
        except FastidcError as refusal:
            found[row] = refusal
    decoded = plan.builder.decode([(plan.paths[row], data) for row, (data, _) in read.items()])
    for (row, (data, mtime)), one in zip(read.items(), decoded, strict=True):
        if isinstance(one, FastidcError):
            found[row] = one
            continue
        pixels, (width, height) = one
        _write(file, pixels, plan.start_of(row))
        found[row] = Entry(plan.names[row], len(data), mtime, digest_of(data).hex(), width, height, zlib.crc32(pixels))
    return [found[row] for row in rows]


def _measure(plan: Plan, file: int) -> dict:
    """How far some of the pixels that were written, now or earlier, are from Pillow's."""

    def compare(row: int) -> np.ndarray | None:
        pixels = np.frombuffer(os.pread(file, plan.image_bytes, plan.start_of(row)), np.uint8).reshape(plan.size, plan.size, 3)
        return off_by(pixels, plan.done[row].crc32, plan.paths[row], plan.size)

    return difference(each(plan, compare, to_compare(len(plan.names)), "compare with Pillow"))


def _finish(plan: Plan, file: int) -> None:
    """Index, then the header that says "finished", then the name; each is on the disk before the next."""
    about = plan.about if plan.builder.facts["name"] == "pillow" else {**plan.about, "difference": _measure(plan, file)}
    index = write_index(about, [plan.done[row] for row in range(len(plan.names))])
    _write(file, index, plan.index_start)
    os.ftruncate(file, plan.index_start + len(index))
    os.fsync(file)
    header = Header(True, len(plan.names), plan.size, plan.size, plan.index_start, len(index), digest_of(index, 32))
    _write(file, header.pack(), 0)
    os.fsync(file)
    os.replace(plan.partial, plan.out)
    sync_folder(plan.out.absolute().parent)
    plan.clear()
