"""Annotations that are one JSON list of objects per split, as those of Spot-the-Diff and Image-Editing-Request."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastidc.data.datasets.base import Object, kind_of, read_json
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink, Where
from fastidc.errors import FastidcError


def first_with(folders: Iterable[Path], names: Iterable[str], keys: set[str]) -> Path | None:
    """The first file of these names whose first object has one of ``keys``: both data sets call their files alike."""
    names = list(names)
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            table = read_json(path)
            if isinstance(table, list) and table and isinstance(table[0], dict) and keys & table[0].keys():
                return path
    return None


def folder_of(root: Path, folders: Iterable[Path], names: tuple[str, ...], title: str) -> Path:
    """The first of ``folders`` that has one of the files; FastidcError if none has."""
    for folder in folders:
        if any((folder / name).is_file() for name in names):
            return folder
    raise FastidcError(f"{root}: no annotations of {title} here ({', '.join(names)}); name another folder or another --dataset.")


def objects(path: Path, fields: tuple[str, ...], name: Callable[[dict], str | None], sink: Sink = STRICT) -> Iterator[tuple[Where, dict]]:
    """(place, object) of those in a file that have all of ``fields``; the others are flaws. ``name``: the id of an object's pair, where it has one.

    Fields besides are nobody's business, and noted once.
    """
    table = read_json(path, Object)
    if not isinstance(table, list):
        raise Flaw("layout", Where(path), f"must be a list of objects, got {kind_of(table)}", level="fatal")
    others: dict[str, int] = {}
    for index, entry in enumerate(table):
        where = Where(path, f"[{index}]")
        if not isinstance(entry, dict):
            sink(Flaw("layout", where, f"must be an object with {', '.join(fields)}, got {kind_of(entry)}"))
            continue
        for flaw in (twice := entry.flaws(where, name(entry))):
            sink(flaw)
        for field in entry.keys() - set(fields):
            others.setdefault(field, index)
        absent = [field for field in fields if field not in entry]
        for field in absent:
            sink(Flaw("field-missing", where, f"has no field {field!r}", f"it needs {', '.join(fields)}", id=name(entry)))
        if not absent and not twice:
            yield where, entry
    for field, index in sorted(others.items()):
        what = f"is none of {', '.join(fields)}, and is not read"
        sink(Flaw("field-unknown", Where(path, f"[{index}]"), what, "take it out if a known one was meant", field=field, level="note"))
