"""A folder of pairs: id.png and id_2.png, in whatever format, with captions in one file or beside them."""

from collections.abc import Iterable
from pathlib import Path

from fastidc.data.datasets.base import (
    SPLIT_NAMES,
    SPLITS,
    Annotations,
    Entry,
    PairRecord,
    Report,
    apply_empty,
    check_unique,
    kind_of,
    number_or_text,
    read_json,
    records,
    sentences_of,
    split_of,
)
from fastidc.data.datasets.files import Files, image_folder
from fastidc.data.datasets.rows import SUFFIXES, Row, table_rows
from fastidc.data.datasets.splitting import hashed_split
from fastidc.errors import FastidcError

COLUMNS = ("id", "caption", "captions", "split", "type")
NAMES = ("captions.json", *(f"captions{suffix}" for suffix in SUFFIXES))
_OTHER_TEXTS = ("readme", "license", "licence", "requirements")


def recognise(root: Path) -> str | None:
    return " and ".join(name for name in NAMES if (root / name).is_file()) or None


def recognise_texts(root: Path) -> str | None:
    """As `recognise`, by texts named as pairs; a weaker sign, which asks for the listing of all images."""
    files = Files()
    for folder in (root / "images", root):
        for path in _texts(files, [folder]):
            if path.stem in files.stems(folder) or f"{path.stem}_2" in files.stems(folder):
                return f"{path.relative_to(root)} beside an image"
    return None


def _texts(files: Files, folders: Iterable[Path]) -> list[Path]:
    """The texts of the first folder that has any, sorted."""
    for folder in folders:
        names = [name for name in files.names(folder) if name.endswith(".txt") and not name.lower().startswith(_OTHER_TEXTS)]
        if names:
            return [folder / name for name in sorted(names)]
    return []


def annotations(root: Path, images: Path | None = None, report: Report | None = None) -> Annotations:
    """Entries per split; their images are names without extension. Looks for no image.

    Captions: captions.json, {id: sentence or [sentences]}; or captions.csv, .tsv or .jsonl with id, caption (one; rows of the same id
    follow each other) or captions (several, "|" between them in a cell), and perhaps split and type; or {id}.txt, a sentence a line, in
    ``root`` or beside the images. Splits: that column, or splits.json {"train": [ids], ...}, which lists every id, or `hashed_split`.
    """
    found = [name for name in NAMES if (root / name).is_file()]
    texts = _texts(Files(), [folder for folder in (images, root / "images", root) if folder is not None])
    if len(found) > 1 or not (found or texts):
        raise FastidcError(f"{root}: one of {', '.join(NAMES)}, or a text per pair, was expected, found {' and '.join(found) or 'none'}.")
    split_file = root / "splits.json"
    if not found:
        entries = [_entry(path.stem, _lines(path), str(path)) for path in texts]
    elif found == ["captions.json"]:
        entries = _from_json(root / "captions.json")
    else:
        columns, entries, places = _from_table(root / found[0])
        if "split" in columns:
            if split_file.is_file():
                raise FastidcError(f"{split_file}: {found[0]} has a field 'split' already; keep one of the two.")
            return check_unique({split: [entry for entry in entries if places[entry.id] == split] for split in SPLITS})
    return _split(split_file, entries) if split_file.is_file() else hashed_split(root.absolute().name, entries, report)


def _entry(id_: str, captions: tuple[str, ...], where: str, kind: str | None = None) -> Entry:
    return Entry(id_, id_, f"{id_}_2", captions, where, type=kind)


def _lines(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # \r\n becomes \n
    except (OSError, UnicodeDecodeError) as error:
        raise FastidcError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    # A blank line is layout and no sentence; a text without any is the pair's empty sentence.
    return tuple(line for line in text.split("\n") if line.strip()) or ("",)


def _from_json(path: Path) -> list[Entry]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise FastidcError(f"{path}: must be an object of id -> sentence or list of sentences, got {kind_of(table)}.")
    return [
        _entry(id_, (value,) if isinstance(value, str) else sentences_of(value, str(path), id_), f"{path}: {id_!r}")
        for id_, value in table.items()
    ]


def _from_table(path: Path) -> tuple[set[str], list[Entry], dict[str, str]]:
    columns, rows = table_rows(path, COLUMNS, ("id",))
    groups: dict[str, list[Row]] = {}
    places: dict[str, str] = {}
    for row in rows:
        id_ = row.needed("id")
        groups.setdefault(id_, []).append(row)
        if "split" in columns:
            split = split_of(row.needed("split"), row.where)
            if places.setdefault(id_, split) != split:
                raise FastidcError(f"{row.where}, field 'split': id {id_!r} is {split} here and {places[id_]} above; keep it in one split.")
    entries = []
    for id_, same in groups.items():
        kind = next((kind for row in same if (kind := row.text("type")) is not None), None)
        entries.append(_entry(id_, tuple(text for row in same for text in row.captions()), same[0].where, kind))
    return columns, entries, places


def _split(path: Path, entries: list[Entry]) -> Annotations:
    table = read_json(path)
    if not isinstance(table, dict):
        raise FastidcError(f"{path}: must be an object of split -> list of ids, got {kind_of(table)}.")
    by_id = {entry.id: entry for entry in entries}
    out: Annotations = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    for name, ids in table.items():
        if name not in SPLIT_NAMES:
            raise FastidcError(f"{path}: field {name!r} is no split; the splits are {', '.join(SPLIT_NAMES)}.")
        if not isinstance(ids, list):
            raise FastidcError(f"{path}: field {name!r} must be a list of ids, got {kind_of(ids)}.")
        for index, value in enumerate(ids):
            id_, where = number_or_text(value), f"{path}: {name}[{index}]"
            if id_ not in by_id:
                raise FastidcError(f"{where} is {value!r}, which has no captions; write some or take it out of the splits.")
            if id_ in seen:
                raise FastidcError(f"{where} is {value!r}, which stands already at {seen[id_]}; keep it in one place.")
            seen[id_] = f"{name}[{index}]"
            out[SPLIT_NAMES[name]].append(by_id[id_])
    for entry in entries:
        if entry.id not in seen:
            raise FastidcError(f"{path}: id {entry.id!r} of {entry.where} is in no split; add it to one.")
    return out


def load(root: Path, images: Path | None, empty: str, report: Report | None) -> dict[str, list[PairRecord]]:
    """Records; images in ``images``, or in images/ of ``root`` or in it. Every image must belong to a captioned pair ({id}_diff aside)."""
    parsed = annotations(root, images, report)
    ids = [entry.id for split in SPLITS for entry in parsed[split]]
    files = Files()
    folder = image_folder(files, images, [root / "images", root], next(iter(ids), None))

    def find(entry: Entry, field: str) -> Path:
        path = files.by_stem(folder, entry.names[field], entry.where)
        if path is None:
            raise FastidcError(
                f"{folder / entry.names[field]}.*: image is missing, but {entry.where} has captions of the pair; put it there, or name "
                "the folder of images with --images."
            )
        return path

    out = records(apply_empty("folder", parsed, empty, report), find)
    known = {f"{id_}{tail}" for id_ in ids for tail in ("", "_2", "_diff")}
    for stem, names in files.stems(folder).items():
        if stem not in known:
            raise FastidcError(
                f"{folder / names[0]}: image has no captions: {stem.removesuffix('_2')!r} is no id; caption the pair or take the image out."
            )
    return out
