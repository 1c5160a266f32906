"""Rows of CSV, TSV and JSONL files, each with its line number."""

import csv
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastidc.data.datasets.base import kind_of, number_or_text, sentences_of
from fastidc.errors import FastidcError

SUFFIXES = (".csv", ".tsv", ".jsonl")
SEPARATOR = "|"  # between the sentences of a cell `captions`


@dataclass(frozen=True)
class Row:
    """The fields of a row that have a value. Cells are strings; the lists of a JSONL file are lists."""

    where: str  # file and line
    fields: dict[str, str | list]
    is_table: bool = True  # a cell's list is written with separators, JSON has lists of its own

    def text(self, field: str) -> str | None:
        """A field's text without blanks around it, None where it is absent; FastidcError where it is neither text nor a whole number."""
        if field not in self.fields:
            return None
        value = number_or_text(self.fields[field])
        if value is None:
            raise FastidcError(f"{self.where}, field {field!r} must be text, got {kind_of(self.fields[field])}.")
        return value.strip()

    def needed(self, field: str) -> str:
        """`text` of a field that every row must have."""
        if field not in self.fields:
            raise FastidcError(f"{self.where}, field {field!r} is empty; every row needs it.")
        return self.text(field)

    def captions(self, one: str = "caption", several: str = "captions") -> tuple[str, ...]:
        """The sentences of a row, blank ones included: one in ``one``, or in ``several`` a JSON list or a cell with "|" between."""
        if several not in self.fields:
            value = self.fields.get(one, "")
            if not isinstance(value, str):
                raise FastidcError(
                    f"{self.where}, field {one!r} must be one sentence, got {kind_of(value)}; a list belongs in {several!r}."
                )
            return (value,)
        value = self.fields[several]
        if isinstance(value, str) and self.is_table:
            return tuple(part.strip() for part in value.split(SEPARATOR))
        return sentences_of(value, self.where, several)


def table_rows(path: Path, allowed: tuple[str, ...], needed: tuple[str, ...]) -> tuple[set[str], list[Row]]:
    """(the columns that the file has, its rows); FastidcError names file, line and field.

    CSV as RFC 4180 and strictly so; in TSV no quotes are needed, and a cell in quotes is taken out of them; JSONL has one object per line.
    All are UTF-8, a byte order mark is skipped, blank lines are too. A cell of nothing but blanks counts as absent.
    """
    read = _json_lines if path.suffix.lower() == ".jsonl" else _cells
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns, rows = read(path, file, allowed, needed)
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FastidcError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    if not rows:
        raise FastidcError(f"{path}: has no pairs; write a row for each.")
    return columns, rows


def _check_fields(where: str, fields: Collection[str], needed: tuple[str, ...]) -> None:
    for field in needed:
        if field not in fields:
            raise FastidcError(f"{where} has no field {field!r}; it needs {', '.join(needed)}.")
    if "caption" not in fields and "captions" not in fields:
        raise FastidcError(f"{where} has neither field 'caption' nor 'captions'; one of them holds the sentences.")
    if "caption" in fields and "captions" in fields:
        raise FastidcError(f"{where} has both fields 'caption' and 'captions'; keep one sentence in the one or several in the other.")


def _unknown(where: str, field: str, allowed: tuple[str, ...]) -> FastidcError:
    return FastidcError(f"{where}, field {field!r} is unknown; the fields are {', '.join(allowed)}.")


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
        raise FastidcError(f"{path}: line {line} cannot be read as {path.suffix[1:].upper()} ({error}); see to its quotes.") from None


def _bare(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _cells(path: Path, file, allowed: tuple[str, ...], needed: tuple[str, ...]) -> tuple[set[str], list[Row]]:
    lines = lines_of(path, file)
    header = [cell.strip() for cell in next(lines, (1, []))[1]]
    for index, field in enumerate(header):
        if field not in allowed:
            raise _unknown(f"{path}: line 1", field, allowed)
        if field in header[:index]:
            raise FastidcError(f"{path}: line 1 has the field {field!r} twice; keep one.")
    _check_fields(f"{path}: line 1", header, needed)
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            quotes = "" if path.suffix.lower() == ".tsv" else "; a sentence with a comma needs quotes"
            raise FastidcError(f"{path}: line {line} has {len(cells)} cells, but line 1 names {len(header)} fields{quotes}.")
        values = {field: cell for field, cell in zip(header, cells, strict=True) if cell.strip()}
        rows.append(Row(f"{path}: line {line}", values))
    return set(header), rows


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _json_lines(path: Path, file, allowed: tuple[str, ...], needed: tuple[str, ...]) -> tuple[set[str], list[Row]]:
    columns, rows = set(), []
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        where = f"{path}: line {line}"
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FastidcError(f"{where} cannot be read as JSON ({error}).") from None
        if not isinstance(table, dict):
            raise FastidcError(f"{where} must be an object with {', '.join(needed)}, got {kind_of(table)}.")
        for field in table:
            if field not in allowed:
                raise _unknown(where, field, allowed)
        _check_fields(where, table, needed)
        columns |= table.keys()
        rows.append(Row(where, {field: value for field, value in table.items() if not _is_blank(value)}, is_table=False))
    return columns, rows
