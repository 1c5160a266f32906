"""Spot-the-Diff, as released or as the official code reformats it (data_evaluation.md 1.2, clip4idc.md 6.3)."""

from pathlib import Path

from fastidc.data.datasets.base import (
    SPLITS,
    Annotations,
    Entry,
    Parsed,
    Report,
    check_unique,
    merged,
    number_or_text,
    sentences_of,
)
from fastidc.data.datasets.files import Files, image_folder, name_flaw
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink
from fastidc.data.datasets.lists import first_with, folder_of, objects

TITLE = "Spot-the-Diff"
FIELDS = ("img_id", "sentences")
NAMES = tuple(f"{prefix}{split}.json" for prefix in ("reformat_", "") for split in SPLITS)


def _folders(root: Path) -> list[Path]:
    return [root, root / "annotations", root / "data", root / "data" / "annotations"]


def recognise(root: Path) -> str | None:
    path = first_with(_folders(root), NAMES, set(FIELDS))
    return None if path is None else f"{path.relative_to(root)} with img_id"


def _files(root: Path) -> dict[str, Path]:
    """Split -> its file, of those that have one."""
    folder = folder_of(root, _folders(root), NAMES, TITLE)
    found = {split: [folder / f"{prefix}{split}.json" for prefix in ("reformat_", "")] for split in SPLITS}
    return {split: path for split, paths in found.items() if (path := next(filter(Path.is_file, paths), None)) is not None}


def annotations(root: Path, sink: Sink = STRICT) -> Annotations:
    """Entries per split, those of one img_id merged; a split without a file is empty. Looks for no image.

    Of a split reformat_{split}.json is read if it is there and {split}.json otherwise; merging makes both the same.
    """
    files, out = _files(root), {}
    for split in SPLITS:
        out[split] = []
        with sink.spare():
            out[split] = merged(_entries(files[split], sink)) if split in files else []
    return check_unique(out, sink)


def _id(item: dict) -> str | None:
    number = number_or_text(item.get("img_id"))
    return None if number is None else f"{number}.png"


def _entries(path: Path, sink: Sink) -> list[Entry]:
    entries = []
    for where, item in objects(path, FIELDS, _id, sink):
        id_ = _id(item)
        if id_ is None:
            sink(Flaw("id", where, f"is {item['img_id']!r}", "the number or name of a pair was expected", field="img_id"))
            continue
        if flaw := name_flaw(str(item["img_id"]), where, "img_id", id_):
            sink(flaw)
            continue
        with sink.spare(id_):
            sentences = sentences_of(item["sentences"], where, "sentences", sink, id_)
            entries.append(Entry(id_, id_, f"{id_.removesuffix('.png')}_2.png", sentences, where))
    return entries


def parse(root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
    """Images {img_id}.png and {img_id}_2.png in ``images``, or in images/ or resized_images/ of ``root`` or beside it, or in it."""
    parsed = annotations(root, sink)
    files, bases = Files(), (root, root / "data", root.absolute().parent)
    folders = [base / name for base in bases for name in ("images", "resized_images")]
    first = next((Path(entry.before).stem for split in SPLITS for entry in parsed[split]), None)
    folder = image_folder(files, images, [*folders, root], first)

    def find(entry: Entry, field: str) -> Path:
        return files.image(folder, entry.names[field], entry.where, field="img_id")

    return Parsed(parsed, tuple(_files(root).values()), find, dict.fromkeys(("before", "after"), "img_id"))
