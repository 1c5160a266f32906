"""Captions and references as the COCO evaluation files that the official scripts read and write (``clip4idc.md`` 6.5).

Results: ``[{"image_id", "caption"}]``. References: ``{"info", "licenses", "type": "captions", "images": [{"filename", "id"}],
"annotations": [{"caption", "id", "image_id"}]}``. In CLEVR-Change ``"000123.png"`` is a change pair, ``"000123.png_n"`` its distractor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError
from fastidc.files import write_text


def write_results(path: str | os.PathLike[str], hypotheses: Mapping[str, str]) -> Path:
    """Write one caption per id, in the order given. Raises FastidcError for a caption that is no text and where writing fails."""
    for pair, caption in hypotheses.items():
        if not isinstance(caption, str):
            raise FastidcError(f"caption of {pair!r} is {type(caption).__name__} and not text; give one sentence for each pair")
    return write_text(path, json.dumps([{"image_id": pair, "caption": caption} for pair, caption in hypotheses.items()]))


def write_references(path: str | os.PathLike[str], references: Mapping[str, Sequence[str]]) -> Path:
    """Write the references of each id, sentence ids counted from 0. Raises FastidcError for one that is no list of sentences."""
    annotations: list[dict[str, Any]] = []
    for pair, sentences in references.items():
        if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise FastidcError(f"references of {pair!r} are not a list of sentences; give a list of strings")
        for sentence in sentences:
            annotations.append({"caption": sentence, "id": len(annotations), "image_id": pair})
    images = [{"filename": pair, "id": pair} for pair in references]
    content = {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    return write_text(path, json.dumps(content))


def read_results(path: str | os.PathLike[str]) -> dict[str, str]:
    """Captions by id. Whole-number ids are read as text; an entry that is there twice, the same both times, counts once.

    Raises FastidcError that names the file, the entry and the field.
    """
    content = _read(path)
    if not isinstance(content, list):
        raise FastidcError(f"{path}: a results file is a list of {{image_id, caption}} and not {_kind(content)}; give the caption file")
    captions: dict[str, str] = {}
    for number, entry in enumerate(content):
        pair, caption = _sentence(path, f"[{number}]", entry)
        if captions.get(pair, caption) != caption:
            raise FastidcError(f"{path}: [{number}].image_id {pair!r} occurs twice with different captions; keep one caption for each pair")
        captions[pair] = caption
    return captions


def read_references(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """References by id, in the order of the annotations. An image may be listed twice (Spot-the-Diff's file does so).

    Raises FastidcError that names the file, the entry and the field.
    """
    content = _read(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise FastidcError(f"{path}: a references file is an object with a list `annotations`; give the COCO file of the references")
    references: dict[str, list[str]] = {}
    for number, entry in enumerate(content["annotations"]):
        pair, caption = _sentence(path, f"annotations[{number}]", entry)
        references.setdefault(pair, []).append(caption)
    return references


def read_types(path: str | os.PathLike[str]) -> dict[str, str]:
    """id -> type of CLEVR-Change's ``type_mapping.json``, ``{"color": ["000000.png", ...], ...}``.

    Raises FastidcError that names the file and the entry, also where an id is of two types.
    """
    content = _read(path)
    if not isinstance(content, dict) or not content:
        raise FastidcError(f"{path}: a type mapping is an object {{type: [ids]}} and not {_kind(content)}; give type_mapping.json")
    types: dict[str, str] = {}
    for kind, pairs in content.items():
        if not isinstance(pairs, list):
            raise FastidcError(f"{path}: {kind!r} is {_kind(pairs)} and not a list of ids; give type_mapping.json")
        for number, pair in enumerate(pairs):
            name = _identity(path, f"{kind}[{number}]", pair)
            if types.setdefault(name, kind) != kind:
                raise FastidcError(f"{path}: {kind}[{number}] {name!r} is also of type {types[name]!r}; keep one type for each pair")
    return types


def read_overlaps(path: str | os.PathLike[str], pairs: Iterable[str]) -> dict[str, float]:
    """id -> IoU for those of ``pairs`` that ``change_captions_by_IOU.json``, ``{"123": "0.42"}``, names by the number in their name.

    Raises FastidcError that names the file and the entry where a value is no number from 0 to 1.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise FastidcError(f"{path}: an IoU file is an object {{scene: IoU}} and not {_kind(content)}; give change_captions_by_IOU.json")
    values: dict[str, float] = {}
    for scene, value in content.items():
        try:
            values[str(int(scene))] = float("nan" if isinstance(value, bool) else value)
            usable = 0.0 <= values[str(int(scene))] <= 1.0
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise FastidcError(f"{path}: {scene!r} is {value!r}; give {{scene number: a number from 0 to 1}}")
    numbers = {pair: re.fullmatch(r"\D*(\d+)(?:\.[A-Za-z0-9]+)?", pair) for pair in pairs}
    return {pair: values[name] for pair, found in numbers.items() if found and (name := str(int(found[1]))) in values}


def _sentence(path: str | os.PathLike[str], where: str, entry: Any) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise FastidcError(f"{path}: {where} is {_kind(entry)} and not an object with image_id and caption; correct that entry")
    name, caption = _identity(path, f"{where}.image_id", entry.get("image_id")), entry.get("caption")
    if not isinstance(caption, str):
        raise FastidcError(f"{path}: {where}.caption is {_kind(caption)}; give one sentence")
    return name, caption


def _identity(path: str | os.PathLike[str], where: str, pair: Any) -> str:
    if isinstance(pair, bool) or not isinstance(pair, (str, int)):
        raise FastidcError(f"{path}: {where} is {_kind(pair)}; give the id of the pair as text")
    return str(pair)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FastidcError(f"{path} cannot be read ({error.strerror or error}); give an existing JSON file") from error
    except UnicodeDecodeError as error:
        raise FastidcError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        place = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise FastidcError(f"{path} is not valid JSON ({place}); correct it or write it again") from error
