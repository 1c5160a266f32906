"""Annotations of every data set as `PairRecord`s. Reads annotations and file names, decodes no pixel."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastidc.data import quarantine as quarantines
from fastidc.data.datasets import birds, clevr, folder, ier, spot, table
from fastidc.data.datasets.base import EMPTY, SPLITS, PairRecord, Parsed, Reader, Report, apply_empty, read_json, records
from fastidc.data.datasets.flaws import STRICT, Collector, Flaw, Sink
from fastidc.errors import FastidcError

__all__ = [
    "DATASETS",
    "EMPTY",
    "SPLITS",
    "Loaded",
    "PairRecord",
    "Report",
    "all_captions",
    "load",
    "load_records",
    "read_json",
    "recognise",
]

_READERS: dict[str, Reader] = {"clevr": clevr, "spot": spot, "ier": ier, "birds": birds, "table": table, "folder": folder}
DATASETS = ("auto", *_READERS)
_LAYOUTS = (
    "CLEVR-Change has splits.json, change_captions.json and images/ in this folder, Spot-the-Diff and Image-Editing-Request have "
    f"train.json, Birds-to-Words has its .tsv, a table of pairs is one of {', '.join(table.NAMES)}, and a folder of pairs has one of "
    f"{', '.join(folder.NAMES)} or a text beside each pair"
)


@dataclass(frozen=True)
class Loaded:
    """A data set as `load` has read it."""

    kind: str
    files: tuple[Path, ...]  # of annotations
    records: dict[str, list[PairRecord]]
    ids: dict[str, list[str]]  # of every split, also of the pairs in ``missing``
    missing: list[Flaw]  # an image of the pair is not there

    @property
    def fingerprint(self) -> str:
        """What a quarantine knows the data set by."""
        return quarantines.fingerprint_of(self.files)


Held = str | Path | quarantines.Quarantine


def load_records(
    root: str | Path,
    dataset: str = "auto",
    *,
    images: str | Path | None = None,
    empty: str = "drop",
    report: Report | None = None,
    quarantine: Held | Sequence[Held] | None = None,
) -> dict[str, list[PairRecord]]:
    """{"train" | "val" | "test": records} of a data set, in the order of its files; a split may be empty.

    root: its folder, or the file of a table. dataset: one of `DATASETS`; "auto" recognises the layout. images: the folder of images
    where it is not beside the annotations. empty: what becomes of blank sentences, see `fastidc.data.datasets.base.apply_empty`; the
    official code keeps them. report: hears, one sentence each, what a user should know: sentences left out, a split that was drawn.
    quarantine: a file of `fastidc check --quarantine`, or several, whose pairs are left out, whole; nothing that is wrong with them is then
    an error.

    FastidcError names the file, index or line, and field that do not fit, or says that the quarantine is another data set's.
    """
    return load(root, dataset, images=images, empty=empty, report=report, quarantine=quarantine).records


def load(
    root: str | Path,
    dataset: str = "auto",
    *,
    images: str | Path | None = None,
    empty: str = "drop",
    report: Report | None = None,
    quarantine: Held | Sequence[Held] | None = None,
    spare: bool = False,
) -> Loaded:
    """`load_records` with more to tell. ``spare``: a pair of which an image is missing is left out, and no error."""
    if empty not in EMPTY:
        raise FastidcError(f"empty is {empty!r}; one of {', '.join(EMPTY)} was expected.")
    held = quarantines.all_of(quarantine)
    sink = quarantines.Forgiving(held) if held else STRICT
    kind, parsed = parse(root, dataset, images, report, sink)
    annotations = parsed.annotations
    if isinstance(sink, quarantines.Forgiving):
        for one in held:
            one.check(kind, quarantines.fingerprint_of(parsed.files))
        for flaw in parsed.left():
            sink(flaw)
        sink.settle()
        gone = set(sink.seen)
        for one in held:
            kept = quarantines.without(annotations, one, gone)
            if report is not None:
                report(one.said({split: len(annotations[split]) - len(kept[split]) for split in SPLITS}))
            annotations, gone = kept, gone | one.pairs.keys()
    annotations, missing = apply_empty(kind, annotations, empty, report), Collector()
    out = records(annotations, parsed.find, missing if spare else STRICT)
    for flaw in parsed.left() if not held else ():
        raise flaw
    ids = {split: [entry.id for entry in annotations[split]] for split in SPLITS}
    return Loaded(kind, parsed.files, out, ids, missing.found)


def parse(
    root: str | Path, dataset: str = "auto", images: str | Path | None = None, report: Report | None = None, sink: Sink = STRICT
) -> tuple[str, Parsed]:
    """The data set's kind, and its annotations before anyone has looked for an image; arguments are those of `load_records`. ``sink`` hears of
    every flaw."""
    root, images = Path(root), None if images is None else Path(images)
    if dataset not in DATASETS:
        raise FastidcError(f"dataset is {dataset!r}; one of {', '.join(DATASETS)} was expected.")
    _check_root(root)
    if not root.is_dir() and dataset not in ("auto", "birds", "table"):
        raise FastidcError(f"{root}: a file, but --dataset {dataset} needs a folder; name the one it lies in.")
    if images is not None and not images.is_dir():
        raise FastidcError(f"{images}: no such folder of images; correct --images.")
    kind = recognise(root) if dataset == "auto" else dataset
    return kind, _READERS[kind].parse(root, images, report, sink)


def _check_root(root: Path) -> None:
    if not root.exists():
        raise FastidcError(f"{root}: no such data folder{' or table' if root.suffix else ''}.")
    if not root.is_dir() and not root.is_file():
        raise FastidcError(f"{root}: is a pipe, a socket or a device; name a folder or the file of a table.")


def recognise(root: str | Path) -> str:
    """The name in `DATASETS` whose layout ``root`` has; FastidcError says what was found where that is none or several."""
    root = Path(root)
    _check_root(root)
    found = {name: sign for name, reader in _READERS.items() if (sign := reader.recognise(root)) is not None}
    if root.is_file() and "birds" in found:  # any other file is a table
        del found["table"]
    if not found and root.is_dir() and (sign := folder.recognise_texts(root)):
        found["folder"] = sign
    if len(found) > 1:
        signs = ", ".join(f"{sign} ({name})" for name, sign in found.items())
        raise FastidcError(f"{root}: mixed layouts, {signs}; choose one of them with --dataset.")
    if not found:
        raise FastidcError(f"{root}: not a known data set; {_LAYOUTS}; {_seen(root)}; name its kind with --dataset, or another folder.")
    return next(iter(found))


def _seen(root: Path) -> str:
    names = sorted(os.listdir(root)) if root.is_dir() else []
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"found here: {shown}" if names else "this folder is empty" if root.is_dir() else "this is a file"


def all_captions(records: Sequence[PairRecord]) -> list[str]:
    """Every sentence of ``records``, of the change and of no change."""
    return [caption for record in records for caption in (*record.captions, *record.no_change_captions)]
