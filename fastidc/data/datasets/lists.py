"""Annotations that are one JSON list of objects per split, as those of Spot-the-Diff and Image-Editing-Request."""

from collections.abc import Iterable
from pathlib import Path

from fastidc.data.datasets.base import kind_of, read_json
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


def objects(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """The objects of a file, each with all of ``fields``; FastidcError names file, index and field."""
    table = read_json(path)
    if not isinstance(table, list):
        raise FastidcError(f"{path}: must be a list of objects, got {kind_of(table)}.")
    for index, entry in enumerate(table):
        if not isinstance(entry, dict):
            raise FastidcError(f"{path}: [{index}] must be an object with {', '.join(fields)}, got {kind_of(entry)}.")
        for field in fields:
            if field not in entry:
                raise FastidcError(f"{path}: [{index}] has no field {field!r}; it needs {', '.join(fields)}.")
    return table
