"""Rows of CSV, TSV and JSONL files, each with its line number."""

import csv
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from fastidc.data.datasets.base import LARGEST, Object, kind_of, number_or_text, reason_of, say_blank, sentences_of
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink, Where
from fastidc.files import open_plain, parse_json

SUFFIXES = (".csv", ".tsv", ".jsonl")
SEPARATOR = "|"  # between the sentences of a cell `captions`


@dataclass(frozen=True)
class Row:
    """The fields of a row that have a value. Cells are strings; the lists of a JSONL file are lists."""

    where: str  # file and line
    fields: dict[str, str | list]
    is_table: bool = True  # a cell's list is written with separators, JSON has lists of its own

    def text(self, field: str) -> str | None:
        """A field's text without blanks around it, None where it is absent; Flaw where it is neither text nor a whole number."""
        if field not in self.fields:
            return None
        value = number_or_text(self.fields[field])
        if value is None:
            raise Flaw("field-type", self.where, f"must be text, got {kind_of(self.fields[field])}", field=field)
        return value.strip()

    def needed(self, field: str) -> str:
        """`text` of a field that every row must have."""
        if field not in self.fields:
            raise Flaw("field-empty", self.where, "is empty", "every row needs it", field=field)
        return self.text(field)

    def captions(self, one: str = "caption", several: str = "captions", sink: Sink = STRICT, id_: str | None = None) -> tuple[str, ...]:
        """The sentences of a row, blank ones included: one in ``one``, or in ``several`` a JSON list or a cell with "|" between."""
        if several not in self.fields:
            value = self.fields.get(one, "")
            if not isinstance(value, str):
                what = f"must be one sentence, got {kind_of(value)}"
                raise Flaw("captions", self.where, what, f"a list belongs in {several!r}", field=one, id=id_)
            if one:
                say_blank(value, self.where, one, None, sink, id_)
            return (value,)
        value = self.fields[several]
        if isinstance(value, str) and self.is_table:
            parts = tuple(part.strip() for part in value.split(SEPARATOR))
            for index, part in enumerate(parts):
                say_blank(part, self.where, several, index, sink, id_)
            return parts
        return sentences_of(value, self.where, several, sink, id_)


def table_rows(path: Path, allowed: tuple[str, ...], needed: tuple[str, ...], sink: Sink = STRICT) -> tuple[set[str], list[Row]]:
    """(the columns that the file has, its rows); flaws name file, line and field, and their rows are left out.

    CSV as RFC 4180 and strictly so; in TSV no quotes are needed, and a cell in quotes is taken out of them; JSONL has one object per line.
    All are UTF-8, a byte order mark is skipped, blank lines are too. A cell of nothing but blanks counts as absent.
    """
    read = _json_lines if path.suffix.lower() == ".jsonl" else _cells
    try:
        with TextIOWrapper(open_plain(path, LARGEST), encoding="utf-8-sig", newline="") as file:
            columns, rows, seen = read(path, file, allowed, needed, sink)
    except FileNotFoundError:
        raise Flaw("file", Where(path), "no such file", "name another", level="fatal") from None
    except (OSError, UnicodeDecodeError) as error:
        fix = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "write it anew"
        raise Flaw("file", Where(path), f"cannot be read as UTF-8 text ({reason_of(error)})", fix, level="fatal") from None
    if not seen:
        raise Flaw("layout", Where(path), "has no pairs", "write a row for each", level="fatal")
    return columns, rows


def _fields_flaw(where: str, fields: Collection[str], needed: tuple[str, ...]) -> Flaw | None:
    """What is wrong with a header or an object of ``fields``, all of which are known."""
    for field in needed:
        if field not in fields:
            return Flaw("field-missing", where, f"has no field {field!r}", f"it needs {', '.join(needed)}")
    if "caption" not in fields and "captions" not in fields:
        return Flaw("field-missing", where, "has neither field 'caption' nor 'captions'", "one of them holds the sentences")
    if "caption" in fields and "captions" in fields:
        return Flaw(
            "field-twice", where, "has both fields 'caption' and 'captions'", "keep one sentence in the one or several in the other"
        )
    return None


def _unknown(where: str, field: str, allowed: tuple[str, ...]) -> Flaw:
    return Flaw("field-unknown", where, "is unknown", f"the fields are {', '.join(allowed)}", field=field)


def separator_flaw(path: Path, where: str, header: list[str]) -> Flaw | None:
    """That the columns of a table are separated by something else than its ending says, where its whole header is one cell."""
    tabs = path.suffix.lower() == ".tsv"
    own, others = ("tabs", ",;|") if tabs else ("commas", ";\t|")
    used = next((sign for sign in others if len(header) == 1 and sign in header[0]), None)
    if used is None:
        return None
    said = "tabs" if used == "\t" else repr(used)
    rename = {"\t": ", or call the file .tsv", ",": ", or call the file .csv"}.get(used, "")
    return Flaw("separator", where, f"has its columns separated by {said}", f"use {own}{rename}", level="fatal")


def lines_of(path: Path, file) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a CSV or TSV file, blank lines left out."""
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, [_bare(cell) for cell in cells] if tabs else cells
            line = reader.line_num + 1
    except csv.Error as error:
        # where an open quote has swallowed lines nobody knows what they were, so there is no going on
        what = f"cannot be read as {path.suffix[1:].upper()} ({error})"
        raise Flaw("quotes", Where(path, f"line {line}"), what, "see to its quotes", level="fatal") from None


def _bare(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


_Rows = tuple[set[str], list[Row], int]  # columns, rows without flaws, how many there are in all


def _cells(path: Path, file, allowed: tuple[str, ...], needed: tuple[str, ...], sink: Sink) -> _Rows:
    lines = lines_of(path, file)
    header, top = [cell.strip() for cell in next(lines, (1, []))[1]], Where(path, "line 1")
    if flaw := separator_flaw(path, top, header):
        raise flaw
    for index, field in enumerate(header):
        flaw = None
        if field not in allowed:
            flaw = _unknown(top, field, allowed)
        elif field in header[:index]:
            flaw = Flaw("field-twice", top, f"has the field {field!r} twice", "keep one")
        if flaw is not None:
            flaw.level = "fatal"  # of every row
            sink(flaw)
    if flaw := _fields_flaw(top, header, needed):
        flaw.level = "fatal"
        raise flaw
    rows, seen = [], 0
    for line, cells in lines:
        where, seen = Where(path, f"line {line}"), seen + 1
        if len(cells) != len(header):
            fix = "see to its tabs" if path.suffix.lower() == ".tsv" else "a sentence with a comma needs quotes"
            sink(Flaw("cells", where, f"has {len(cells)} cells, but line 1 names {len(header)} fields", fix))
            continue
        rows.append(Row(where, {field: cell for field, cell in zip(header, cells, strict=True) if cell.strip()}))
    return set(header), rows, seen


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _json_lines(path: Path, file, allowed: tuple[str, ...], needed: tuple[str, ...], sink: Sink) -> _Rows:
    columns, rows, seen = set(), [], 0
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        where, seen = Where(path, f"line {line}"), seen + 1
        try:
            table = parse_json(text, Object)
        except ValueError as error:
            sink(Flaw("json", where, f"cannot be read as JSON ({error})", "see to its quotes and brackets"))
            continue
        if not isinstance(table, dict):
            sink(Flaw("layout", where, f"must be an object with {', '.join(needed)}, got {kind_of(table)}"))
            continue
        flaws = table.flaws(where, None)
        flaws += [_unknown(where, field, allowed) for field in table if field not in allowed]
        flaws += [flaw] if (flaw := _fields_flaw(where, table, needed)) else []
        for flaw in flaws:
            flaw.id = number_or_text(table.get("id"))
            sink(flaw)
        if not flaws:
            columns |= table.keys()
            rows.append(Row(where, {field: value for field, value in table.items() if not _is_blank(value)}, is_table=False))
    return columns, rows, seen
