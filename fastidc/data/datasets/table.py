"""Anyone's pairs: a CSV, TSV or JSONL file with the two images and the sentences of a pair in a row."""

import os
from collections import Counter
from pathlib import Path

from fastidc.data.datasets.base import SPLITS, Annotations, Entry, PairRecord, Report, apply_empty, check_unique, records, split_of
from fastidc.data.datasets.files import Files
from fastidc.data.datasets.rows import SUFFIXES, Row, table_rows
from fastidc.data.datasets.splitting import hashed_split
from fastidc.errors import FastidcError

COLUMNS = ("before", "after", "caption", "captions", "id", "split", "type", "distractor", "no_change_captions")
NAMES = tuple(f"pairs{suffix}" for suffix in SUFFIXES)


def recognise(root: Path) -> str | None:
    if root.is_file():
        return root.name if root.suffix.lower() in SUFFIXES else None
    return " and ".join(name for name in NAMES if (root / name).is_file()) or None


def file_of(root: Path) -> Path:
    """The table: ``root`` itself or the one pairs.csv, pairs.tsv or pairs.jsonl in it."""
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise FastidcError(f"{root}: a table ends in {', '.join(SUFFIXES)}; rename it as what it is.")
        return root
    found = [name for name in NAMES if (root / name).is_file()]
    if len(found) != 1:
        raise FastidcError(f"{root}: one of {', '.join(NAMES)} was expected, found {' and '.join(found) or 'none'}; name the file itself.")
    return root / found[0]


def annotations(root: Path, report: Report | None = None) -> Annotations:
    """Entries per split, one per pair in order of first appearance. Looks for no image.

    A row has before, after (paths) and either caption (one sentence) or captions (several: a JSON list, or a cell with "|" between
    them). Optional are id, split (train, val, valid, validation or test), type, and, together, distractor (path) and no_change_captions
    (as captions). Rows of the same id, or without that column of the same two paths, are one pair and their sentences follow each
    other. Without the column id a pair is called after its files: "{before}-{after}", or "{before}" where both are called alike; names
    that meet take their folders in. Without the column split see `hashed_split`.
    """
    path = file_of(root)
    columns, rows = table_rows(path, COLUMNS, ("before", "after"))
    if ("distractor" in columns) != ("no_change_captions" in columns):
        raise FastidcError(f"{path}: must have both fields 'distractor' and 'no_change_captions' or neither.")
    groups: dict = {}
    for row in rows:
        groups.setdefault(row.needed("id") if "id" in columns else (row.needed("before"), row.needed("after")), []).append(row)
    ids = list(groups) if "id" in columns else _ids(list(groups))
    entries = [_entry(id_, same) for id_, same in zip(ids, groups.values(), strict=True)]
    if "split" not in columns:
        return hashed_split(path.name, check_unique({"train": entries, "val": [], "test": []})["train"], report)
    out: Annotations = {split: [] for split in SPLITS}
    for entry, same in zip(entries, groups.values(), strict=True):
        out[_agreed(entry.id, same, "split")].append(entry)
    return check_unique(out)


def _ids(pairs: list[tuple[str, str]]) -> list[str]:
    short = [_joined(*(os.path.splitext(os.path.basename(name))[0] for name in pair)) for pair in pairs]
    uses = Counter(short)
    return [_joined(*map(_flat, pair)) if uses[name] > 1 else name for name, pair in zip(short, pairs, strict=True)]


def _flat(name: str) -> str:
    return os.path.splitext(name)[0].replace(os.sep, "_")


def _joined(before: str, after: str) -> str:
    return before if before == after else f"{before}-{after}"


def _agreed(id_: str, rows: list[Row], field: str) -> str | None:
    """The value that all rows of a pair give; only distractor and type may be absent. FastidcError where two differ."""
    value, first = None, rows[0]
    for row in rows:
        own = row.text(field) if field in ("distractor", "type") else row.needed(field)
        if own is None:
            continue
        own = split_of(own, row.where) if field == "split" else own
        if value is not None and own != value:
            raise FastidcError(
                f"{row.where}, field {field!r} is {own!r}, but {first.where} has {value!r} for the same pair {id_!r}; make them agree, "
                "or give another pair another id."
            )
        if value is None:
            value, first = own, row
    return value


def _entry(id_: str, rows: list[Row]) -> Entry:
    where = rows[0].where
    before, after, distractor, kind = (_agreed(id_, rows, field) for field in ("before", "after", "distractor", "type"))
    captions = tuple(text for row in rows for text in row.captions())
    same = (row.captions("", "no_change_captions") for row in rows)
    no_change = tuple(dict.fromkeys(text for texts in same for text in texts if text.strip()))
    if (distractor is None) != (not no_change):
        raise FastidcError(f"{where}: pair {id_!r} needs both fields 'distractor' and 'no_change_captions' or neither.")
    return Entry(id_, before, after, captions, where, distractor, no_change, kind)


def load(root: Path, images: Path | None, empty: str, report: Report | None) -> dict[str, list[PairRecord]]:
    """Records; paths count from ``images`` or else from the table's folder, and name their files exactly."""
    parsed = apply_empty("table", annotations(root, report), empty, report)
    files, folder = Files(), images or file_of(root).parent
    return records(
        parsed, lambda entry, field: files.image(folder, entry.names[field], f"{entry.where}, field {field!r}", other_extension=False)
    )
