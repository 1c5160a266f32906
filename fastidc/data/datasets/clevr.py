"""CLEVR-Change, and every world rendered in its layout (data_evaluation.md 1.1, clip4idc.md 6.2)."""

import os
from pathlib import Path

from fastidc.data.datasets.base import SPLITS, PairRecord, Report, kind_of, read_json
from fastidc.errors import FastidcError

# Folder -> the word in its files' names: before, after, distractor.
FOLDERS = {"images": "default", "sc_images": "semantic", "nsc_images": "nonsemantic"}


def recognise(root: Path) -> str | None:
    return next((sign for folder in (root, root / "data") if (sign := _sign(folder))), None)


def _sign(folder: Path) -> str | None:
    # splits.json alone is no sign: a folder of pairs may have one.
    for name in ("change_captions.json", "no_change_captions.json"):
        if (folder / name).is_file():
            return name
    return "splits.json and sc_images" if (folder / "splits.json").is_file() and (folder / "sc_images").is_dir() else None


def load(root: Path, images: Path | None, empty: str, report: Report | None) -> dict[str, list[PairRecord]]:
    """Records in the order of splits.json. A blank sentence is an error under either policy."""
    if _sign(root) is None and _sign(root / "data") is not None:
        root = root / "data"
    if images is not None and report is not None:
        report(f"clevr: images are read from {root}, and --images has no effect, as officially.")
    scenes = splits(root / "splits.json")
    change, no_change = (sentences(root / name) for name in ("change_captions.json", "no_change_captions.json"))
    kinds = types(root / "type_mapping.json") if (root / "type_mapping.json").is_file() else {}
    folders = {name: root / name for name in FOLDERS}
    present = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FastidcError(f"{folder}: no such folder; CLEVR-Change keeps its images in images/, sc_images/ and nsc_images/.")
        present[name] = set(os.listdir(folder))

    def record(number: int, where: str) -> PairRecord:
        files = {name: f"CLEVR_{word}_{number:06d}.png" for name, word in FOLDERS.items()}
        for name, file in files.items():
            if file not in present[name]:
                raise FastidcError(f"{folders[name] / file}: image is missing, but splits.json lists it as {where} = {number}.")
        key, id_ = files["images"], f"{number:06d}.png"
        for path, table in (("change_captions.json", change), ("no_change_captions.json", no_change)):
            if key not in table:
                raise FastidcError(f"{root / path}: no field {key!r}, but splits.json lists it as {where} = {number}.")
        before, after, distractor = (folders[name] / file for name, file in files.items())
        return PairRecord(id_, before, after, change[key], distractor, no_change[key], kinds.get(id_))

    return {split: [record(number, f"{split}[{index}]") for index, number in enumerate(scenes[split])] for split in SPLITS}


def splits(path: Path) -> dict[str, list[int]]:
    """splits.json: split -> scene numbers, every scene once."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(table.get(name), list) for name in SPLITS):
        raise FastidcError(f'{path}: must be an object with the lists "train", "val" and "test".')
    seen: dict[int, tuple[str, int]] = {}
    for split in SPLITS:
        for index, number in enumerate(table[split]):
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise FastidcError(f"{path}: {split}[{index}] is {number!r}; a scene number (an integer from 0) was expected.")
            if number in seen:
                other, at = seen[number]
                raise FastidcError(f"{path}: scene {number} stands twice, as {other}[{at}] and {split}[{index}]; keep it in one place.")
            seen[number] = (split, index)
    return {split: table[split] for split in SPLITS}


def sentences(path: Path) -> dict[str, tuple[str, ...]]:
    """change_captions.json or no_change_captions.json: name of the before-image -> its sentences."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise FastidcError(f"{path}: must be an object of image name -> list of sentences, got {kind_of(table)}.")
    for key, texts in table.items():
        if not isinstance(texts, list) or not texts:
            raise FastidcError(f"{path}: field {key!r} must be a non-empty list of sentences, got {kind_of(texts)}.")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise FastidcError(f"{path}: field {key!r}[{index}] must be a sentence, got {text!r}.")
    return {key: tuple(texts) for key, texts in table.items()}


def types(path: Path) -> dict[str, str]:
    """type_mapping.json turned round: record id -> type of its change."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(names, list) for names in table.values()):
        raise FastidcError(f"{path}: must be an object of change type -> list of image names.")
    out: dict[str, str] = {}
    for kind, names in table.items():
        for index, name in enumerate(names):
            if not isinstance(name, str):
                raise FastidcError(f"{path}: field {kind!r}[{index}] must be an image name, got {name!r}.")
            if out.setdefault(name, kind) != kind:
                raise FastidcError(f"{path}: {name!r} stands under two types, {out[name]!r} and {kind!r}[{index}]; keep it under one.")
    return out
