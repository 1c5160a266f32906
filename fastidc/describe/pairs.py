"""Which pairs there are: of a folder, a table, a data set or a stream, with or without captions, none of their images opened."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidc.data.datasets import table
from fastidc.data.datasets.base import kind_of
from fastidc.data.datasets.files import Files
from fastidc.data.datasets.rows import Row, lines_of
from fastidc.data.records import SPLITS, PairRecord, load_records, recognise
from fastidc.errors import FastidcError

NEEDED = ("before", "after")


@dataclass(frozen=True)
class Pair:
    """Two images by their paths, and what the pair is called."""

    id: str
    before: Path
    after: Path


def read_pairs(source: Path, split: str = "all", images: Path | None = None, report: Callable[[str], None] | None = None) -> list[Pair]:
    """The pairs of ``source``, in its order; a distractor makes a pair of its own, "<id>_n".

    source: a folder of {id}.png and {id}_2.png (any format of image; in images/ of it or in it), captions or none beside them; a .csv, .tsv
    or .jsonl table with before and after, paths from its folder, and perhaps id, split and other columns of
    `fastidc.data.datasets.table`; a folder with pairs.csv, .tsv or .jsonl; or a data set of `fastidc.data.records`. split: train, val, test
    or all of it, where the source has splits. images: the folder of images where it is another. report: hears what is left out.

    FastidcError names the file, line and field that do not fit. Whether an image is there is looked at when it is read.
    """
    if split != "all" and split not in SPLITS:
        raise FastidcError(f"split is {split!r}; one of {', '.join(SPLITS)} or all was expected.")
    if images is not None and not images.is_dir():
        raise FastidcError(f"{images}: no such folder of images; correct --images.")
    kind = _kind(source)
    if kind == "folder":
        found = _of_folder(source, images, report)
        if split != "all":
            raise FastidcError(f"{source}: a folder of pairs has no splits to choose from; leave --split out.")
    elif kind == "table":
        found = _of_table(table.file_of(source), split, images)
    else:
        records = load_records(source, kind, images=images, empty="keep", report=report)
        found = [pair for name in SPLITS if split in ("all", name) for record in records[name] for pair in _of_record(record)]
    if not found:
        raise FastidcError(f"{source}: has no pairs{'' if split == 'all' else f' of the split {split}'} to read.")
    return found


def _kind(source: Path) -> str:
    try:
        return recognise(source)
    except FastidcError:
        # pairs by their names alone: no caption tells their layout
        if source.is_dir() and any(_by_name(Files(), folder)[0] for folder in (source / "images", source)):
            return "folder"
        raise


def _of_record(record: PairRecord) -> list[Pair]:
    pairs = [Pair(record.id, record.before, record.after)]
    return pairs if record.distractor is None else [*pairs, Pair(record.no_change_id, record.before, record.distractor)]


def _by_name(files: Files, folder: Path) -> tuple[list[str], list[str]]:
    """(ids of the pairs, names that belong to none) among the images of a folder, sorted."""
    stems = files.stems(folder)
    ids = [stem for stem in sorted(stems) if f"{stem}_2" in stems and not (stem.endswith("_2") and stem[:-2] in stems)]
    known = {f"{name}{tail}" for name in ids for tail in ("", "_2", "_diff")}
    return ids, [name for stem in sorted(set(stems) - known) for name in stems[stem]]


def _of_folder(root: Path, images: Path | None, report: Callable[[str], None] | None) -> list[Pair]:
    files = Files()
    for folder in [images] if images is not None else [root / "images", root]:
        ids, lonely = _by_name(files, folder)
        if not ids:
            continue
        if lonely and report is not None:
            shown = ", ".join(lonely[:3]) + (", ..." if len(lonely) > 3 else "")
            report(f"{folder}: {len(lonely)} images make no pair {{id}}, {{id}}_2 and are left out: {shown}.")
        return [Pair(name, *(files.by_stem(folder, f"{name}{tail}", str(folder)) for tail in ("", "_2"))) for name in ids]
    raise FastidcError(f"{images or root}: no two images are called {{id}} and {{id}}_2; name pairs so, or list them in a table.")


def _of_table(path: Path, split: str, images: Path | None) -> list[Pair]:
    rows = list(_rows(path))
    if not rows:
        raise FastidcError(f"{path}: has no pairs; write a row for each.")
    if split != "all":
        if not any("split" in row.fields for row in rows):
            raise FastidcError(f"{path}: has no field 'split' to choose {split} by; leave --split out.")
        rows = [row for row in rows if row.text("split") and table.split_of(row.text("split"), row.where) == split]
    folder = images or path.parent
    names = [(row.needed("before"), row.needed("after")) for row in rows]
    given = [row.text("id") for row in rows]
    made = dict(zip(distinct := list(dict.fromkeys(names)), _names(distinct), strict=True))
    found: dict[str, Pair] = {}
    for row, pair, own in zip(rows, names, given, strict=True):
        if own is None and any(given):
            row.needed("id")
        pair_id = own or made[pair]
        there = Pair(pair_id, *(folder / name for name in pair))
        if found.setdefault(pair_id, there) != there:
            raise FastidcError(f"{row.where}: id {pair_id!r} stands above with other images; give another pair another id.")
        if distractor := row.text("distractor"):
            found.setdefault(f"{pair_id}_n", Pair(f"{pair_id}_n", there.before, folder / distractor))
    return list(found.values())


def _rows(path: Path) -> Iterator[Row]:
    """Rows of a table whose captions may be absent: `fastidc.data.datasets.rows` is for learning from, and asks for them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                yield from (json_row(f"{path}: line {line}", text) for line, text in enumerate(file, 1) if text.strip())
                return
            lines = lines_of(path, file)
            header = [cell.strip() for cell in next(lines, (1, []))[1]]
            _check_fields(f"{path}: line 1", header)
            for line, cells in lines:
                where = f"{path}: line {line}"
                if len(cells) != len(header):
                    raise FastidcError(
                        f"{where} has {len(cells)} cells, but line 1 names {len(header)} fields; a comma in a cell needs quotes."
                    )
                yield Row(where, {field: cell for field, cell in zip(header, cells, strict=True) if cell.strip()})
    except (OSError, UnicodeDecodeError) as error:
        raise FastidcError(f"{path}: cannot be read as UTF-8 text ({error}).") from None


def _check_fields(where: str, fields: Iterable[str]) -> None:
    fields = list(fields)
    for index, field in enumerate(fields):
        if field not in table.COLUMNS:
            raise FastidcError(f"{where}, field {field!r} is unknown; the fields are {', '.join(table.COLUMNS)}.")
        if field in fields[:index]:
            raise FastidcError(f"{where} has the field {field!r} twice; keep one.")
    for field in NEEDED:
        if field not in fields:
            raise FastidcError(f"{where} has no field {field!r}; it needs {' and '.join(NEEDED)}.")


def json_row(where: str, text: str) -> Row:
    """A line of JSONL as a row with before and after; FastidcError begins with ``where``."""
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FastidcError(f"{where} cannot be read as JSON ({error}).") from None
    if not isinstance(values, dict):
        raise FastidcError(f"{where} must be an object with {' and '.join(NEEDED)}, got {kind_of(values)}.")
    _check_fields(where, values)
    return Row(where, {field: value for field, value in values.items() if value is not None and value != ""}, is_table=False)


def stream_pairs(lines: Iterable[str], images: Path | None = None, name: str = "standard input") -> Iterator[Pair]:
    """Pairs of JSONL lines as they come: {"before": path, "after": path} and perhaps "id"; paths count from ``images`` or from here.

    Without an id a pair is called after its files, as in a table; one that is called as an earlier one has "#2", "#3", ... behind it.
    FastidcError names the line.
    """
    folder, uses, taken = images or Path(), Counter(), set()
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        row = json_row(f"{name}: line {number}", text)
        before, after = row.needed("before"), row.needed("after")
        pair_id = row.text("id")
        if pair_id is None:
            short = _short(before, after)
            uses[short] += 1
            pair_id = short if uses[short] == 1 else f"{short}#{uses[short]}"
        if pair_id in taken:
            raise FastidcError(f"{row.where}: id {pair_id!r} stands above; give another pair another id.")
        taken.add(pair_id)
        yield Pair(pair_id, folder / before, folder / after)


def _names(pairs: list[tuple[str, str]]) -> list[str]:
    """As `fastidc.data.datasets.table` calls pairs that have no id: after their files, with their folders where two would be called alike."""
    uses = Counter(_short(*pair) for pair in pairs)
    whole = [_joined(*(os.path.splitext(name)[0].replace(os.sep, "_") for name in pair)) for pair in pairs]
    return [long if uses[short := _short(*pair)] > 1 else short for pair, long in zip(pairs, whole, strict=True)]


def _short(before: str, after: str) -> str:
    return _joined(*(os.path.splitext(os.path.basename(name))[0] for name in (before, after)))


def _joined(before: str, after: str) -> str:
    return before if before == after else f"{before}-{after}"
