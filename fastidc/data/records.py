"""Annotations of every data set as `PairRecord`s. Reads JSON and file names, decodes no pixel."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastidc.errors import FastidcError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class PairRecord:
    """One scene: two images that differ, the sentences that say how, and maybe a distractor that differs in nothing but the view."""

    id: str  # the image_id of evaluation files; the distractor pair's is `no_change_id`
    before: Path
    after: Path
    captions: tuple[str, ...]
    distractor: Path | None = None
    no_change_captions: tuple[str, ...] = ()
    type: str | None = None  # the kind of change, where the data set says it

    @property
    def no_change_id(self) -> str:
        return f"{self.id}_n"

    @property
    def images(self) -> tuple[Path, ...]:
        """before, after and, where there is one, the distractor."""
        return (self.before, self.after) if self.distractor is None else (self.before, self.after, self.distractor)


def read_json(path: Path):
    """The parsed file; FastidcError naming it where it is absent or not UTF-8 JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FastidcError(f"{path}: cannot be read as JSON ({error}).") from None


def load_records(root: str | Path) -> dict[str, list[PairRecord]]:
    """{"train" | "val" | "test": records} of the data set under ``root``, in the order of its files.

    CLEVR-Change's own layout (data_evaluation.md 1.1). FastidcError names the file, index and field that do not fit.
    """
    root = Path(root)
    if not root.is_dir():
        raise FastidcError(f"{root}: no such data folder.")
    if (root / "splits.json").is_file():
        return _clevr_change(root)
    inner = root / "data"
    if (inner / "splits.json").is_file():
        return _clevr_change(inner)
    raise FastidcError(f"{root}: not a known data set; CLEVR-Change has splits.json, change_captions.json and images/ in this folder.")


def _clevr_change(root: Path) -> dict[str, list[PairRecord]]:
    splits = _splits(root / "splits.json")
    change = _sentences(root / "change_captions.json")
    no_change = _sentences(root / "no_change_captions.json")
    types = _types(root / "type_mapping.json") if (root / "type_mapping.json").is_file() else {}
    folders = {name: root / name for name in ("images", "sc_images", "nsc_images")}
    present = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FastidcError(f"{folder}: no such folder; CLEVR-Change keeps its images in images/, sc_images/ and nsc_images/.")
        present[name] = {entry.name for entry in folder.iterdir()}
    records: dict[str, list[PairRecord]] = {}
    for split, ids in splits.items():
        records[split] = []
        for index, number in enumerate(ids):
            key = f"CLEVR_default_{number:06d}.png"
            files = {
                "images": key,
                "sc_images": f"CLEVR_semantic_{number:06d}.png",
                "nsc_images": f"CLEVR_nonsemantic_{number:06d}.png",
            }
            for folder, file in files.items():
                if file not in present[folder]:
                    raise FastidcError(
                        f"{folders[folder] / file}: image is missing, but splits.json lists it as {split}[{index}] = {number}."
                    )
            for path, sentences in (("change_captions.json", change), ("no_change_captions.json", no_change)):
                if key not in sentences:
                    raise FastidcError(f"{root / path}: no field {key!r}, but splits.json lists it as {split}[{index}] = {number}.")
            before, after, distractor = (folders[folder] / file for folder, file in files.items())
            name = f"{number:06d}.png"
            records[split].append(PairRecord(name, before, after, change[key], distractor, no_change[key], types.get(name)))
    return records


def _splits(path: Path) -> dict[str, list[int]]:
    splits = read_json(path)
    if not isinstance(splits, dict) or not all(isinstance(splits.get(name), list) for name in SPLITS):
        raise FastidcError(f'{path}: must be an object with the lists "train", "val" and "test".')
    seen: dict[int, tuple[str, int]] = {}
    for split in SPLITS:
        for index, number in enumerate(splits[split]):
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise FastidcError(f"{path}: {split}[{index}] is {number!r}; a scene number (an integer from 0) was expected.")
            if number in seen:
                other, at = seen[number]
                raise FastidcError(f"{path}: scene {number} stands twice, as {other}[{at}] and {split}[{index}]; keep it in one place.")
            seen[number] = (split, index)
    return {split: splits[split] for split in SPLITS}


def _sentences(path: Path) -> dict[str, tuple[str, ...]]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise FastidcError(f"{path}: must be an object of image name -> list of sentences, got {_kind(table)}.")
    for key, sentences in table.items():
        if not isinstance(sentences, list) or not sentences:
            raise FastidcError(f"{path}: field {key!r} must be a non-empty list of sentences, got {_kind(sentences)}.")
        for index, sentence in enumerate(sentences):
            if not isinstance(sentence, str) or not sentence.strip():
                raise FastidcError(f"{path}: field {key!r}[{index}] must be a sentence, got {sentence!r}.")
    return {key: tuple(sentences) for key, sentences in table.items()}


def _types(path: Path) -> dict[str, str]:
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(names, list) for names in table.values()):
        raise FastidcError(f"{path}: must be an object of change type -> list of image names.")
    return {name: kind for kind, names in table.items() for name in names}


def _kind(value) -> str:
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def all_captions(records: Sequence[PairRecord]) -> list[str]:
    """Every sentence of ``records``, of the change and of no change."""
    return [caption for record in records for caption in (*record.captions, *record.no_change_captions)]
