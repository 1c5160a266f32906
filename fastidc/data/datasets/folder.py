"""A folder of pairs: id.png and id_2.png, in whatever format, with captions in one file or beside them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from fastidc.data.datasets.base import (
    LARGEST,
    SPLIT_NAMES,
    SPLITS,
    Annotations,
    Entry,
    Parsed,
    Report,
    kind_of,
    number_or_text,
    read_object,
    reason_of,
    say_blank,
    sentences_of,
    split_of,
)
from fastidc.data.datasets.files import Files, image_folder, name_flaw
from fastidc.data.datasets.flaws import STRICT, Collector, Flaw, Sink, Where
from fastidc.data.datasets.rows import SUFFIXES, Row, table_rows
from fastidc.data.datasets.splitting import hashed_split
from fastidc.errors import FastidcError
from fastidc.files import read_plain

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


def annotations(root: Path, images: Path | None = None, report: Report | None = None, sink: Sink = STRICT) -> Annotations:
    """Entries per split; their images are names without extension. Looks for no image.

    Captions: captions.json, {id: sentence or [sentences]}; or captions.csv, .tsv or .jsonl with id, caption (one; rows of the same id
    follow each other) or captions (several, "|" between them in a cell), and perhaps split and type; or {id}.txt, a sentence a line, in
    ``root`` or beside the images. Splits: that column, or splits.json {"train": [ids], ...}, which lists every id, or `hashed_split`.
    """
    captions, split_file = _captions(root, images), root / "splits.json"
    entries, places = _entries(captions, sink)
    if places is None and not split_file.is_file():
        return hashed_split(root.absolute().name, entries, report)
    out: Annotations = {split: [] for split in SPLITS}
    with sink.spare():
        if places is None:
            return _split(split_file, entries, sink)
        if split_file.is_file():
            what = f"{captions[0].name} has a field 'split' already"
            raise Flaw("split", Where(split_file), what, "keep one of the two", level="fatal")
        out |= {split: [entry for entry in entries if places.get(entry.id) == split] for split in SPLITS}
    return out


def _entries(captions: list[Path], sink: Sink) -> tuple[list[Entry], dict[str, str] | None]:
    """The captioned pairs, and the splits where the captions' table says them."""
    with sink.spare():
        if captions[0].suffix == ".txt":
            return _from_texts(captions, sink), None
        return (_from_json(captions[0], sink), None) if captions[0].suffix == ".json" else _from_table(captions[0], sink)
    return [], None


def _captions(root: Path, images: Path | None) -> list[Path]:
    """The one file of captions, or the texts; FastidcError where there is none or more than one."""
    found = [name for name in NAMES if (root / name).is_file()]
    texts = _texts(Files(), [folder for folder in (images, root / "images", root) if folder is not None])
    if len(found) > 1 or not (found or texts):
        raise FastidcError(f"{root}: one of {', '.join(NAMES)}, or a text per pair, was expected, found {' and '.join(found) or 'none'}.")
    return [root / found[0]] if found else texts


def _entry(id_: str, captions: tuple[str, ...], where: str, kind: str | None = None) -> Entry:
    return Entry(id_, id_, f"{id_}_2", captions, where, type=kind)


def _from_texts(paths: list[Path], sink: Sink) -> list[Entry]:
    entries = []
    for path in paths:
        try:
            text = read_plain(path, LARGEST).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except (OSError, UnicodeDecodeError) as error:
            sink(Flaw("file", Where(path), f"cannot be read as UTF-8 text ({reason_of(error)})", "save it as UTF-8", id=path.stem))
            text = ""
        # A blank line is layout and no sentence; a text without any is the pair's empty sentence.
        sentences = tuple(line for line in text.split("\n") if line.strip()) or ("",)
        if sentences == ("",):
            say_blank("", Where(path), "text", None, sink, path.stem)
        entries.append(_entry(path.stem, sentences, Where(path)))
    return entries


def _from_json(path: Path, sink: Sink) -> list[Entry]:
    entries = []
    for id_, value in read_object(path, "id -> sentence or list of sentences", sink).items():
        if flaw := name_flaw(id_, Where(path), id_, id_):
            sink(flaw)
            continue
        captions: tuple[str, ...] = (value,) if isinstance(value, str) else ()
        if isinstance(value, str):
            say_blank(value, Where(path), id_, None, sink, id_)
        else:
            with sink.spare(id_):
                captions = sentences_of(value, Where(path), id_, sink, id_)
        entries.append(_entry(id_, captions, Where(path, repr(id_))))
    return entries


def _from_table(path: Path, sink: Sink) -> tuple[list[Entry], dict[str, str] | None]:
    columns, rows = table_rows(path, COLUMNS, ("id",), sink)
    groups: dict[str, list[Row]] = {}
    places: dict[str, str] = {}
    for row in rows:
        with sink.spare():
            id_ = row.needed("id")
            if flaw := name_flaw(id_, row.where, "id", id_):
                raise flaw
            groups.setdefault(id_, []).append(row)
            if "split" in columns:
                split = split_of(row.needed("split"), row.where)
                if places.setdefault(id_, split) != split:
                    what = f"is {split}, but id {id_!r} is {places[id_]} above"
                    sink(Flaw("split", row.where, what, "keep it in one split", field="split", id=id_))
    entries = []
    for id_, same in groups.items():
        captions: list[str] = []
        kind = None
        for row in same:
            with sink.spare(id_):
                captions += row.captions(sink=sink, id_=id_)
                kind = kind or row.text("type")
        entries.append(_entry(id_, tuple(captions), same[0].where, kind))
    return entries, places if "split" in columns else None


def _split(path: Path, entries: list[Entry], sink: Sink) -> Annotations:
    by_id = {entry.id: entry for entry in entries}
    out: Annotations = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    for name, ids in read_object(path, "split -> list of ids", sink).items():
        if name not in SPLIT_NAMES:
            what = f"is no split; the splits are {', '.join(SPLIT_NAMES)}"
            sink(Flaw("split", Where(path), what, field=name, level="fatal"))
            continue
        if not isinstance(ids, list):
            sink(Flaw("split", Where(path), f"must be a list of ids, got {kind_of(ids)}", field=name, level="fatal"))
            continue
        for index, value in enumerate(ids):
            id_, where = number_or_text(value), Where(path, f"{name}[{index}]")
            if id_ not in by_id:
                sink(
                    Flaw(
                        "captions-missing", where, f"is {value!r}, which has no captions", "write some or take it out of the splits", id=id_
                    )
                )
            elif id_ in seen:
                sink(Flaw("duplicate", where, f"is {value!r}, which stands already at {seen[id_]}", "keep it in one place", id=id_))
            else:
                seen[id_] = f"{name}[{index}]"
                out[SPLIT_NAMES[name]].append(by_id[id_])
    for entry in entries:
        if entry.id not in seen:
            sink(Flaw("in-no-split", Where(path), f"id {entry.id!r} of {entry.where} is in no split", "add it to one", id=entry.id))
    return out


def parse(root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
    """Images in ``images``, or in images/ of ``root`` or in it. Every image must belong to a captioned pair ({id}_diff aside)."""
    parsed = annotations(root, images, report, sink)
    ids = [entry.id for split in SPLITS for entry in parsed[split]]
    files, captions = Files(), _captions(root, images)
    folder = image_folder(files, images, [root / "images", root], next(iter(ids), None))
    fix = "put it there, or name the folder of images with --images"

    def find(entry: Entry, field: str) -> Path:
        path = files.by_stem(folder, entry.names[field], entry.where)
        if path is None:
            raise files.missing(folder / entry.names[field], entry.where, fix, shown=".*")
        return path

    def left() -> Iterator[Flaw]:
        captioned = [entry.id for entry in _entries(captions, Collector())[0]]  # of which a flaw may have taken some out of the splits
        known = {f"{id_}{tail}" for id_ in captioned for tail in ("", "_2", "_diff")}
        for stem, names in files.stems(folder).items():
            if stem not in known:
                id_ = stem.removesuffix("_2")
                what = f"image has no captions: {id_!r} is no id"
                yield Flaw("image-alone", Where(folder / names[0]), what, "caption the pair or take the image out", id=id_)

    read = [*captions, *([root / "splits.json"] if (root / "splits.json").is_file() else [])]
    return Parsed(parsed, tuple(read), find, {"before": "", "after": ""}, left)
