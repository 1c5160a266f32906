"""Spot-the-Diff, as released or as the official code reformats it (data_evaluation.md 1.2, clip4idc.md 6.3)."""

from pathlib import Path

from fastidc.data.datasets.base import (
    SPLITS,
    Annotations,
    Entry,
    PairRecord,
    Report,
    apply_empty,
    check_unique,
    merged,
    number_or_text,
    records,
    sentences_of,
)
from fastidc.data.datasets.files import Files, image_folder
from fastidc.data.datasets.lists import first_with, folder_of, objects
from fastidc.errors import FastidcError

TITLE = "Spot-the-Diff"
FIELDS = ("img_id", "sentences")
NAMES = tuple(f"{prefix}{split}.json" for prefix in ("reformat_", "") for split in SPLITS)


def _folders(root: Path) -> list[Path]:
    return [root, root / "annotations", root / "data", root / "data" / "annotations"]


def recognise(root: Path) -> str | None:
    path = first_with(_folders(root), NAMES, set(FIELDS))
    return None if path is None else f"{path.relative_to(root)} with img_id"


def annotations(root: Path) -> Annotations:
    """Entries per split, those of one img_id merged; a split without a file is empty. Looks for no image.

    Of a split reformat_{split}.json is read if it is there and {split}.json otherwise; merging makes both the same.
    """
    folder = folder_of(root, _folders(root), NAMES, TITLE)
    out: Annotations = {}
    for split in SPLITS:
        path = next((path for prefix in ("reformat_", "") if (path := folder / f"{prefix}{split}.json").is_file()), None)
        out[split] = [] if path is None else merged(_entry(path, index, item) for index, item in enumerate(objects(path, FIELDS)))
    return check_unique(out)


def _entry(path: Path, index: int, item: dict) -> Entry:
    where, number = f"{path}: [{index}]", number_or_text(item["img_id"])
    if number is None:
        raise FastidcError(f"{where}, field 'img_id' is {item['img_id']!r}; the number or name of a pair was expected.")
    return Entry(f"{number}.png", f"{number}.png", f"{number}_2.png", sentences_of(item["sentences"], where, "sentences"), where)


def load(root: Path, images: Path | None, empty: str, report: Report | None) -> dict[str, list[PairRecord]]:
    """Records; images {img_id}.png and {img_id}_2.png in ``images``, or in images/ or resized_images/ of ``root`` or beside it, or in it."""
    parsed = apply_empty("spot", annotations(root), empty, report)
    files, bases = Files(), (root, root / "data", root.absolute().parent)
    folders = [base / name for base in bases for name in ("images", "resized_images")]
    first = next((Path(entry.before).stem for split in SPLITS for entry in parsed[split]), None)
    folder = image_folder(files, images, [*folders, root], first)
    return records(parsed, lambda entry, field: files.image(folder, entry.names[field], f"{entry.where}, field 'img_id'"))
