"""Anyone's pairs: a CSV, TSV or JSONL file with the two images and the sentences of a pair in a row."""

import os
from collections import Counter
from pathlib import Path

from fastidc.data.datasets.base import SPLITS, Annotations, Entry, Parsed, Report, check_unique, split_of
from fastidc.data.datasets.files import Files
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink, Where
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


def annotations(root: Path, report: Report | None = None, sink: Sink = STRICT) -> Annotations:
    """Entries per split, one per pair in order of first appearance. Looks for no image.

    A row has before, after (paths) and either caption (one sentence) or captions (several: a JSON list, or a cell with "|" between
    them). Optional are id, split (train, val, valid, validation or test), type, and, together, distractor (path) and no_change_captions
    (as captions). Rows of the same id, or without that column of the same two paths, are one pair and their sentences follow each
    other. Without the column id a pair is called after its files: "{before}-{after}", or "{before}" where both are called alike; names
    that meet take their folders in. Without the column split see `hashed_split`.
    """
    path, out = file_of(root), {split: [] for split in SPLITS}
    with sink.spare():
        columns, rows = table_rows(path, COLUMNS, ("before", "after"), sink)
        if ("distractor" in columns) != ("no_change_captions" in columns):
            what = "must have both fields 'distractor' and 'no_change_captions' or neither"
            sink(Flaw("field-missing", Where(path), what, level="fatal"))
        groups = _groups(rows, "id" in columns, sink)
        ids = list(groups) if "id" in columns else _ids(list(groups))
        entries: list[Entry] = []
        splits: dict[str, str] = {}
        for id_, same in zip(ids, groups.values(), strict=True):
            with sink.spare(id_):
                entry = _entry(id_, same, sink)
                if "split" in columns:
                    splits[id_] = _agreed(id_, same, "split", sink)
                if entry is not None:
                    entries.append(entry)
        if "split" not in columns:
            return hashed_split(path.name, check_unique({"train": entries, "val": [], "test": []}, sink)["train"], report)
        for entry in entries:
            out[splits[entry.id]].append(entry)
    return check_unique(out, sink)


def _groups(rows: list[Row], has_ids: bool, sink: Sink) -> dict:
    """The rows of each pair, by id or by (before, after)."""
    groups: dict = {}
    for row in rows:
        with sink.spare():
            groups.setdefault(row.needed("id") if has_ids else (row.needed("before"), row.needed("after")), []).append(row)
    return groups


def _ids(pairs: list[tuple[str, str]]) -> list[str]:
    short = [_joined(*(os.path.splitext(os.path.basename(name))[0] for name in pair)) for pair in pairs]
    uses = Counter(short)
    return [_joined(*map(_flat, pair)) if uses[name] > 1 else name for name, pair in zip(short, pairs, strict=True)]


def _flat(name: str) -> str:
    return os.path.splitext(name)[0].replace(os.sep, "_")


def _joined(before: str, after: str) -> str:
    return before if before == after else f"{before}-{after}"


def _agreed(id_: str, rows: list[Row], field: str, sink: Sink = STRICT) -> str | None:
    """The value that all rows of a pair give; only distractor and type may be absent. Flaws where two differ; Flaw where there is none."""
    value, first = None, rows[0]
    for row in rows:
        own = row.text(field) if field in ("distractor", "type") else row.needed(field)
        if own is None:
            continue
        own = split_of(own, row.where) if field == "split" else own
        if value is not None and own != value:
            what = f"is {own!r}, but {first.where} has {value!r} for the same pair {id_!r}"
            sink(Flaw("disagree", row.where, what, "make them agree, or give another pair another id", field=field, id=id_))
        if value is None:
            value, first = own, row
    return value


def _entry(id_: str, rows: list[Row], sink: Sink) -> Entry | None:
    """None where nobody knows its images; the sink does."""
    where, found = rows[0].where, {}
    for field in ("before", "after", "distractor", "type"):
        with sink.spare(id_):
            found[field] = _agreed(id_, rows, field, sink)
    captions: list[str] = []
    no_change: list[str] = []
    for row in rows:
        with sink.spare(id_):
            captions += row.captions(sink=sink, id_=id_)
        with sink.spare(id_):
            no_change += row.captions("", "no_change_captions", sink, id_)
    no_change = [text for text in dict.fromkeys(no_change) if text.strip()]
    if (found.get("distractor") is None) != (not no_change):
        what = f"(pair {id_!r}) needs both fields 'distractor' and 'no_change_captions' or neither"
        sink(Flaw("field-missing", where, what, "write the other, too", id=id_))
        found["distractor"], no_change = None, []
    before, after = found.get("before"), found.get("after")
    if before is None or after is None:
        return None
    return Entry(id_, before, after, tuple(captions), where, found.get("distractor"), tuple(no_change), found.get("type"))


def parse(root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
    """Paths count from ``images`` or else from the table's folder, stay in it, and name their files exactly. What links in it point to is the
    user's business: only the path as it is written is judged."""
    files, table = Files(), file_of(root)
    folder = images or table.parent
    inside = os.path.join(os.path.abspath(folder), "")

    def find(entry: Entry, field: str) -> Path:
        name = entry.names[field]
        if "\0" in name:
            raise Flaw("image-name", entry.where, f"is {name!r}, and no file can be called so", "write the file's path", field=field)
        if os.path.isabs(name) or os.pardir in name.split(os.sep):
            # the path without "..", which behind a link would lead elsewhere
            name = os.path.normpath(os.path.join(inside, name))
            if not name.startswith(inside):
                what = f"is {entry.names[field]!r}, which leaves {folder}"
                fix = "write paths from a folder that holds all images, and name it with --images"
                raise Flaw("path-outside", entry.where, what, fix, field=field)
            name = name.removeprefix(inside)
        return files.image(folder, name, entry.where, other_extension=False, field=field)

    fields = {field: field for field in ("before", "after", "distractor")}
    return Parsed(annotations(root, report, sink), (table,), find, fields)
