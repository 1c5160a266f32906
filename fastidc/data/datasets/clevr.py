"""CLEVR-Change, and every world rendered in its layout (data_evaluation.md 1.1, clip4idc.md 6.2)."""

from collections.abc import Collection
from pathlib import Path

from fastidc.data.datasets.base import SPLITS, Annotations, Entry, Parsed, Report, read_object, sentences_of
from fastidc.data.datasets.files import Files
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink, Where

# Folder -> the word in its files' names: before, after, distractor.
FOLDERS = {"images": "default", "sc_images": "semantic", "nsc_images": "nonsemantic"}
_FIELDS = ("before", "after", "distractor")
_CAPTIONS = ("change_captions.json", "no_change_captions.json")


def recognise(root: Path) -> str | None:
    return next((sign for folder in (root, root / "data") if (sign := _sign(folder))), None)


def _sign(folder: Path) -> str | None:
    # splits.json alone is no sign: a folder of pairs may have one.
    for name in _CAPTIONS:
        if (folder / name).is_file():
            return name
    return "splits.json and sc_images" if (folder / "splits.json").is_file() and (folder / "sc_images").is_dir() else None


def parse(root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
    """Entries in the order of splits.json. A blank sentence is an error under either policy."""
    if _sign(root) is None and _sign(root / "data") is not None:
        root = root / "data"
    if images is not None and report is not None:
        report(f"clevr: images are read from {root}, and --images has no effect, as officially.")
    files, folders = Files(), dict(zip(_FIELDS, (root / name for name in FOLDERS), strict=True))
    for folder in folders.values():
        if not folder.is_dir():
            fix = "CLEVR-Change keeps its images in images/, sc_images/ and nsc_images/"
            sink(Flaw("folder", Where(folder), "no such folder", fix, level="fatal"))

    def find(entry: Entry, field: str) -> Path:
        path = folders[field] / entry.names[field]
        if path.name not in files.names(path.parent):
            raise files.missing(path, entry.where, "put it there, or take its scene out of splits.json")
        return path

    names = ["splits.json", *_CAPTIONS, *(["type_mapping.json"] if (root / "type_mapping.json").is_file() else [])]
    return Parsed(annotations(root, sink), tuple(root / name for name in names), find, {field: "" for field in _FIELDS})


def annotations(root: Path, sink: Sink = STRICT) -> Annotations:
    """Entries per split; ``root`` is the folder of splits.json. Looks for no image."""
    scenes: dict[str, list[int]] = {}
    tables: list[dict[str, tuple[str, ...]]] = []
    kinds: dict[str, str] = {}
    with sink.spare():
        scenes = splits(root / "splits.json", sink)
    for name in _CAPTIONS:
        with sink.spare():
            tables.append(sentences(root / name, sink))
    with sink.spare():
        kinds = types(root / "type_mapping.json", sink) if (root / "type_mapping.json").is_file() else {}
    out: Annotations = {split: [] for split in SPLITS}
    if not scenes or len(tables) < len(_CAPTIONS):
        return out
    used = set()
    for split in SPLITS:
        for index, number in enumerate(scenes[split]):
            if number is None:
                continue
            used.add(number)
            where, id_ = Where(root / "splits.json", f"{split}[{index}]"), f"{number:06d}.png"
            names = [f"CLEVR_{word}_{number:06d}.png" for word in FOLDERS.values()]
            key, absent = names[0], False
            for name, table in zip(_CAPTIONS, tables, strict=True):
                if key not in table:
                    what = f"has no field {key!r}, but {where} lists it as {number}"
                    sink(Flaw("captions-missing", Where(root / name), what, "caption it, or take it out of the splits", id=id_))
                    absent = True
            if not absent:
                before, after, distractor = names
                change, no_change = (table[key] for table in tables)
                out[split].append(Entry(id_, before, after, change, where, distractor, no_change, kinds.get(id_)))
    for name, table in zip(_CAPTIONS, tables, strict=True):
        _unused(root / name, table.keys() - {f"CLEVR_default_{number:06d}.png" for number in used}, sink)
    _unused(root / "type_mapping.json", kinds.keys() - {f"{number:06d}.png" for number in used}, sink)
    return out


def _unused(path: Path, names: Collection[str], sink: Sink) -> None:
    if names:
        what = f"has {len(names):,} that are in no split, such as {min(names)!r}, and they are not read"
        sink(Flaw("in-no-split", Where(path), what, "add their scenes to splits.json if they were meant", level="note"))


def splits(path: Path, sink: Sink = STRICT) -> dict[str, list[int | None]]:
    """splits.json: split -> scene numbers, every scene once; None in the place of one that is flawed."""
    table = read_object(path, "split -> list of scene numbers", sink)
    if not all(isinstance(table.get(name), list) for name in SPLITS):
        raise Flaw("layout", Where(path), 'must be an object with the lists "train", "val" and "test"', level="fatal")
    seen: dict[int, tuple[str, int]] = {}
    out: dict[str, list[int | None]] = {}
    for split in SPLITS:
        out[split] = []
        for index, number in enumerate(table[split]):
            where, good = Where(path, f"{split}[{index}]"), None
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                sink(Flaw("id", where, f"is {number!r}", "a scene number (an integer from 0) was expected"))
            elif number in seen:
                other, at = seen[number]
                what = f"is scene {number}, which stands already at {other}[{at}]"
                sink(Flaw("duplicate", where, what, "keep it in one place", id=f"{number:06d}.png"))
            else:
                seen[number], good = (split, index), number
            out[split].append(good)
    return out


def sentences(path: Path, sink: Sink = STRICT) -> dict[str, tuple[str, ...]]:
    """change_captions.json or no_change_captions.json: name of the before-image -> its sentences."""
    out = {}
    for key, texts in read_object(path, "image name -> list of sentences", sink, _id).items():
        out[key] = ()  # one flaw is enough of it
        with sink.spare(_id(key)):
            out[key] = sentences_of(texts, Where(path), key, sink, _id(key), blank="bad")
    return out


def _id(key: str) -> str:
    """The record's id of a before-image's name."""
    return key.removeprefix("CLEVR_default_")


def types(path: Path, sink: Sink = STRICT) -> dict[str, str]:
    """type_mapping.json turned round: record id -> type of its change."""
    table = read_object(path, "change type -> list of image names", sink)
    if not all(isinstance(names, list) for names in table.values()):
        raise Flaw("layout", Where(path), "must be an object of change type -> list of image names", level="fatal")
    out: dict[str, str] = {}
    for kind, names in table.items():
        for index, name in enumerate(names):
            if not isinstance(name, str):
                sink(Flaw("type", Where(path), f"must be an image name, got {name!r}", field=kind, at=index))
            elif out.setdefault(name, kind) != kind:
                what = f"is {name!r}, which stands under {out[name]!r}, too"
                sink(Flaw("type", Where(path), what, "keep it under one", field=kind, at=index, id=name))
    return out
