"""Image-Editing-Request (data_evaluation.md 1.3, clip4idc.md 6.4)."""

from pathlib import Path

from fastidc.data.datasets.base import (
    SPLITS,
    Annotations,
    Entry,
    Parsed,
    Report,
    check_unique,
    number_or_text,
    sentences_of,
)
from fastidc.data.datasets.files import Files, image_folder, name_flaw
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink
from fastidc.data.datasets.lists import first_with, folder_of, objects
from fastidc.errors import FastidcError

TITLE = "Image-Editing-Request"
FIELDS = ("img0", "img1", "sents", "uid")
NAMES = ("train.json", "valid.json", "val.json", "test.json")
_IMAGES = {"before": "img0", "after": "img1"}


def _folders(root: Path) -> list[Path]:
    return [root, root / "dataset" / "adobe", root / "adobe", root / "data"]


def recognise(root: Path) -> str | None:
    path = first_with(_folders(root), NAMES, set(FIELDS))
    return None if path is None else f"{path.relative_to(root)} with img0"


def _files(root: Path) -> dict[str, Path]:
    """Split -> its file, of those that have one."""
    folder, out = folder_of(root, _folders(root), NAMES, TITLE), {}
    for split, names in {"train": ["train.json"], "val": ["valid.json", "val.json"], "test": ["test.json"]}.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if len(paths) > 1:
            raise FastidcError(f"{folder}: has both {' and '.join(names)}; keep the one that is meant.")
        if paths:
            out[split] = paths[0]
    return out


def annotations(root: Path, sink: Sink = STRICT) -> Annotations:
    """Entries per split, one per uid: several may share their images. A split without a file is empty. Looks for no image."""
    files, out = _files(root), {}
    for split in SPLITS:
        out[split] = []
        with sink.spare():
            out[split] = _entries(files[split], sink) if split in files else []
    return check_unique(out, sink)


def _entries(path: Path, sink: Sink) -> list[Entry]:
    entries = []
    for where, item in objects(path, FIELDS, lambda item: number_or_text(item.get("uid")), sink):
        uid, good = number_or_text(item["uid"]), True
        if uid is None:
            sink(Flaw("id", where, f"is {item['uid']!r}", "a name that no other entry has was expected", field="uid"))
        for field in _IMAGES.values():
            if not isinstance(item[field], str) or not item[field].strip():
                sink(Flaw("image-name", where, f"is {item[field]!r}", "the name of an image file was expected", field=field, id=uid))
                good = False
            elif flaw := name_flaw(item[field], where, field, uid):
                sink(flaw)
                good = False
        with sink.spare(uid):
            sentences = sentences_of(item["sents"], where, "sents", sink, uid)
            if good and uid is not None:
                entries.append(Entry(uid, item["img0"], item["img1"], sentences, where))
    return entries


def parse(root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
    """Images in ``images``, or in images/ of ``root``, of its annotations' folder or beside either, or in these themselves.

    Files of the wild come as jpg, jpeg, JPG, png and gif, and mirrors rename them: where the named file is missing, the one image of
    the same name with another extension is taken.
    """
    parsed = annotations(root, sink)
    files, notes = Files(), folder_of(root, _folders(root), NAMES, TITLE)
    bases = [root, notes, notes.absolute().parent, root.absolute().parent]
    first = next((Path(entry.before).stem for split in SPLITS for entry in parsed[split]), None)
    folder = image_folder(files, images, [*(base / "images" for base in bases), root, notes], first)

    def find(entry: Entry, field: str) -> Path:
        return files.image(folder, entry.names[field], entry.where, field=_IMAGES[field])

    return Parsed(parsed, tuple(_files(root).values()), find, _IMAGES)
