"""Which pairs there are: of a folder, a table, a data set or a stream, with or without captions, none of their images opened."""

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from fastidc.data.datasets import table
from fastidc.data.datasets.base import kind_of
from fastidc.data.datasets.files import Files
from fastidc.data.datasets.flaws import printed
from fastidc.data.datasets.rows import Row, lines_of, separator_flaw
from fastidc.data.records import SPLITS, PairRecord, load_records, recognise
from fastidc.errors import FastidcError
from fastidc.files import open_plain, parse_json

NEEDED = ("before", "after")


@dataclass(frozen=True)
class Pair:
    """Two images by their paths, and what the pair is called."""

    id: str
    before: Path
    after: Path


class BadRow(NamedTuple):
    """A row of a table or a stream that makes no pair, in its place among them."""

    id: str  # "line 3" where the row gives none, or one that is taken
    error: FastidcError


def read_pairs(
    source: Path, split: str = "all", images: Path | None = None, report: Callable[[str], None] | None = None
) -> list[Pair | BadRow]:
    """The pairs of ``source``, in its order; a distractor makes a pair of its own, "<id>_n".

    source: a folder of {id}.png and {id}_2.png (any format of image; in images/ of it or in it), captions or none beside them; a .csv, .tsv
    or .jsonl table with before and after, paths from its folder, and perhaps id, split and other columns of
    `fastidc.data.datasets.table`; a folder with pairs.csv, .tsv or .jsonl; or a data set of `fastidc.data.records`. split: train, val, test
    or all of it, where the source has splits. images: the folder of images where it is another. report: hears what is left out.

    A row of a table that does not fit is a `BadRow`, and where none fits, or the header does not, a FastidcError; both name the file, line
    and field. Whether an image is there is looked at when it is read.
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


def _of_table(path: Path, split: str, images: Path | None) -> list[Pair | BadRow]:
    lines = list(_rows(path))
    if not lines:
        raise FastidcError(f"{path}: has no pairs; write a row for each.")
    errors = [line.error for line in lines if line.error is not None]
    if len(errors) == len(lines):
        raise errors[0]
    if split != "all" and not any(line.row is not None and "split" in line.row.fields for line in lines):
        raise FastidcError(f"{path}: has no field 'split' to choose {split} by; leave --split out.")
    read = [(line, found) for line in lines if (found := _fields_of(line, split)) is not None]
    good = [found for _, found in read if isinstance(found, _Fields)]
    distinct = list(dict.fromkeys((found.before, found.after) for found in good))
    made = dict(zip(distinct, _names(distinct), strict=True))
    has_ids = any(found.id for found in good)
    folder = images or path.parent
    pairs: dict[str, Pair] = {}
    places: dict[str, Pair | BadRow] = {}  # what stands where, a row that makes no pair by its line
    for line, found in read:
        try:
            if isinstance(found, FastidcError):
                raise found
            if found.id is None and has_ids:
                line.row.needed("id")
            pair_id = found.id or made[found.before, found.after]
            there = Pair(pair_id, folder / found.before, folder / found.after)
            if pairs.get(pair_id, there) != there:
                raise FastidcError(
                    f"{line.row.where}: id {printed(repr(pair_id))} stands above with other images; give another pair another id."
                )
        except FastidcError as error:
            places[f"\n{line.number}"] = _bad(line, error, pairs)
            continue
        added = {pair_id: there}
        if found.distractor:
            added[f"{pair_id}_n"] = Pair(f"{pair_id}_n", there.before, folder / found.distractor)
        for name, pair in added.items():
            places.setdefault(name, pairs.setdefault(name, pair))
    if places and not pairs:
        raise next(iter(places.values())).error
    return list(places.values())


class _Fields(NamedTuple):
    before: str
    after: str
    id: str | None
    distractor: str | None


class _Line(NamedTuple):
    """A row of a file; without ``row`` it cannot be read, with an ``error`` it makes no pair."""

    number: int
    row: Row | None
    error: FastidcError | None = None


def _fields_of(line: _Line, split: str) -> _Fields | FastidcError | None:
    """What a pair is made of, or why there is none; None where the row is of another split."""
    row = line.row
    try:
        if row is None:
            raise line.error
        if split != "all" and not (row.text("split") and table.split_of(row.text("split"), row.where) == split):
            return None
        if line.error is not None:
            raise line.error
        fields = _Fields(row.needed("before"), row.needed("after"), row.text("id"), row.text("distractor"))
        for field in ("before", "after", "distractor"):
            if "\0" in (name := getattr(fields, field) or ""):
                raise FastidcError(
                    f"{row.where}, field {field!r} is {printed(repr(name))}, and no file can be called so; write the file's path."
                )
        return fields
    except FastidcError as error:
        return error


def _bad(line: _Line, error: FastidcError, taken: Container[str]) -> BadRow:
    """Called by its own id where that is known and not another's."""
    own = None
    if line.row is not None:
        with suppress(FastidcError):
            own = line.row.text("id")
    return BadRow(own if own and own not in taken else f"line {line.number}", error)


def _rows(path: Path) -> Iterator[_Line]:
    """Rows of a table whose captions may be absent: `fastidc.data.datasets.rows` is for learning from, and asks for them."""
    try:
        if path.suffix.lower() == ".jsonl":
            with open_plain(path) as file:
                yield from _json_lines(file, str(path))
            return
        # a byte that is no UTF-8 becomes half a surrogate pair, which costs its own row
        with TextIOWrapper(open_plain(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = lines_of(path, file)
            header = [cell.strip() for cell in next(lines, (1, []))[1]]
            if not _is_text(header):
                raise FastidcError(f"{path}: line 1 cannot be read as UTF-8 text; save it as UTF-8.")
            if flaw := separator_flaw(path, f"{path}: line 1", header):
                raise flaw
            _check_fields(f"{path}: line 1", header)
            for number, cells in lines:
                where = f"{path}: line {number}"
                if len(cells) != len(header):
                    what = f"has {len(cells)} cells, but line 1 names {len(header)} fields; a comma in a cell needs quotes."
                    yield _Line(number, None, FastidcError(f"{where} {what}"))
                elif not _is_text(cells):
                    yield _Line(number, None, FastidcError(f"{where} cannot be read as UTF-8 text; save it as UTF-8."))
                else:
                    yield _Line(number, Row(where, {field: cell for field, cell in zip(header, cells, strict=True) if cell.strip()}))
    except OSError as error:
        raise FastidcError(f"{path}: cannot be read ({error.strerror or error}); name another.") from None


def _is_text(cells: list[str]) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for cell in cells if not cell.isascii() for letter in cell)


def _check_fields(where: str, fields: Iterable[str]) -> None:
    fields = list(fields)
    for index, field in enumerate(fields):
        if field not in table.COLUMNS:
            raise FastidcError(f"{where}, field {printed(repr(field))} is unknown; the fields are {', '.join(table.COLUMNS)}.")
        if field in fields[:index]:
            raise FastidcError(f"{where} has the field {printed(repr(field))} twice; keep one.")
    for field in NEEDED:
        if field not in fields:
            raise FastidcError(f"{where} has no field {field!r}; it needs {' and '.join(NEEDED)}.")


def _json_lines(lines: Iterable[str | bytes], name: str) -> Iterator[_Line]:
    """Lines of JSONL as rows with before and after, blank ones left out; errors begin with ``name`` and the line."""
    for number, line in enumerate(lines, 1):
        where = f"{name}: line {number}"
        try:
            text = line if isinstance(line, str) else line.decode("utf-8-sig")
            if not text.strip():
                continue
            values: Any = parse_json(text)
        except UnicodeDecodeError as error:
            yield _Line(number, None, FastidcError(f"{where} is not UTF-8 text ({error})."))
            continue
        except ValueError as error:
            yield _Line(number, None, FastidcError(f"{where} cannot be read as JSON ({error})."))
            continue
        if not isinstance(values, dict):
            what = f"must be an object with {' and '.join(NEEDED)}, got {kind_of(values)}."
            yield _Line(number, None, FastidcError(f"{where} {what}"))
            continue
        found = None
        try:
            _check_fields(where, values)
        except FastidcError as error:
            found = error
        fields = {field: value for field, value in values.items() if value is not None and value != ""}
        yield _Line(number, Row(where, fields, is_table=False), found)


def stream_pairs(lines: Iterable[str | bytes], images: Path | None = None) -> Iterator[Pair | BadRow]:
    """Pairs of JSONL lines as they come: {"before": path, "after": path} and perhaps "id"; paths count from ``images`` or from here.

    Without an id a pair is called after its files, as in a table; one that is called as an earlier one has "#2", "#3", ... behind it.
    A line that does not fit is a `BadRow`, whose error names it.
    """
    folder, uses, taken = images or Path(), Counter(), set()
    for line in _json_lines(lines, "standard input"):
        fields = _fields_of(line, "all")
        if isinstance(fields, FastidcError):
            yield _bad(line, fields, taken)
            continue
        pair_id = fields.id
        if pair_id is None:
            short = _short(fields.before, fields.after)
            uses[short] += 1
            pair_id = short if uses[short] == 1 else f"{short}#{uses[short]}"
        if pair_id in taken:
            error = FastidcError(f"{line.row.where}: id {printed(repr(pair_id))} stands above; give another pair another id.")
            yield _bad(line, error, taken)
            continue
        taken.add(pair_id)
        yield Pair(pair_id, folder / fields.before, folder / fields.after)


def _names(pairs: list[tuple[str, str]]) -> list[str]:
    """As `fastidc.data.datasets.table` calls pairs that have no id: after their files, with their folders where two would be called alike."""
    uses = Counter(_short(*pair) for pair in pairs)
    whole = [_joined(*(os.path.splitext(name)[0].replace(os.sep, "_") for name in pair)) for pair in pairs]
    return [long if uses[short := _short(*pair)] > 1 else short for pair, long in zip(pairs, whole, strict=True)]


def _short(before: str, after: str) -> str:
    return _joined(*(os.path.splitext(os.path.basename(name))[0] for name in (before, after)))


def _joined(before: str, after: str) -> str:
    return before if before == after else f"{before}-{after}"
