"""Image-Editing-Request (data_evaluation.md 1.3, clip4idc.md 6.4)."""

from pathlib import Path

from fastidc.data.datasets.base import (
    SPLITS,
    Annotations,
    Entry,
    PairRecord,
    Report,
    apply_empty,
    check_unique,
    number_or_text,
    records,
    sentences_of,
)
from fastidc.data.datasets.files import Files, image_folder
from fastidc.data.datasets.lists import first_with, folder_of, objects
from fastidc.errors import FastidcError

TITLE = "Image-Editing-Request"
FIELDS = ("img0", "img1", "sents", "uid")
NAMES = ("train.json", "valid.json", "val.json", "test.json")


def _folders(root: Path) -> list[Path]:
    return [root, root / "dataset" / "adobe", root / "adobe", root / "data"]


def recognise(root: Path) -> str | None:
    path = first_with(_folders(root), NAMES, set(FIELDS))
    return None if path is None else f"{path.relative_to(root)} with img0"


def annotations(root: Path) -> Annotations:
    """Entries per split, one per uid: several may share their images. A split without a file is empty. Looks for no image."""
    folder = folder_of(root, _folders(root), NAMES, TITLE)
    out: Annotations = {}
    for split, names in {"train": ["train.json"], "val": ["valid.json", "val.json"], "test": ["test.json"]}.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if len(paths) > 1:
            raise FastidcError(f"{folder}: has both {' and '.join(names)}; keep the one that is meant.")
        out[split] = [_entry(path, index, item) for path in paths for index, item in enumerate(objects(path, FIELDS))]
    return check_unique(out)


def _entry(path: Path, index: int, item: dict) -> Entry:
    where, uid = f"{path}: [{index}]", number_or_text(item["uid"])
    if uid is None:
        raise FastidcError(f"{where}, field 'uid' is {item['uid']!r}; a name that no other entry has was expected.")
    for field in ("img0", "img1"):
        if not isinstance(item[field], str) or not item[field].strip():
            raise FastidcError(f"{where}, field {field!r} is {item[field]!r}; the name of an image file was expected.")
    return Entry(uid, item["img0"], item["img1"], sentences_of(item["sents"], where, "sents"), where)


def load(root: Path, images: Path | None, empty: str, report: Report | None) -> dict[str, list[PairRecord]]:
    """Records; images in ``images``, or in images/ of ``root``, of its annotations' folder or beside either, or in these themselves.

    Files of the wild come as jpg, jpeg, JPG, png and gif, and mirrors rename them: where the named file is missing, the one image of
    the same name with another extension is taken.
    """
    parsed = apply_empty("ier", annotations(root), empty, report)
    files, notes = Files(), folder_of(root, _folders(root), NAMES, TITLE)
    bases = [root, notes, notes.absolute().parent, root.absolute().parent]
    first = next((Path(entry.before).stem for split in SPLITS for entry in parsed[split]), None)
    folder = image_folder(files, images, [*(base / "images" for base in bases), root, notes], first)
    fields = {"before": "img0", "after": "img1"}
    return records(parsed, lambda entry, field: files.image(folder, entry.names[field], f"{entry.where}, field {fields[field]!r}"))
