"""A finished run judged again: its captions or its retrieval on a split, from its files or from its model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError
from fastidc.evaluate.captions import change_accuracy, is_no_change_id, type_accuracy
from fastidc.evaluate.coco import read_overlaps, read_references, read_results
from fastidc.evaluate.probability import auc, calibrate, calibration_error
from fastidc.files import parse_json

_IOU_FILE = "change_captions_by_IOU.json"


@dataclass(frozen=True)
class RunFolder:
    """What a run's ``config.json`` says of it. ``data``: the folder it was trained on, or the one that is given instead."""

    folder: Path
    stage: str
    dataset: str
    data: Path
    max_words: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], data: Path | None = None) -> RunFolder:
        """Raises FastidcError where ``config`` is not that of a run of `fastidc adapt` or `fastidc finetune`."""
        run, recipe = config.get("run"), config.get("recipe")
        if config.get("stage") not in ("adapt", "finetune") or not isinstance(run, Mapping) or not isinstance(recipe, Mapping):
            raise FastidcError(f"{folder}: its config.json is not that of a run; give a folder that `fastidc adapt` or `finetune` wrote.")
        try:
            return cls(folder, config["stage"], run["dataset"], data or Path(run["data"]), int(recipe["max_words"]), run)
        except (KeyError, TypeError, ValueError) as error:
            raise FastidcError(
                f"{folder}: its config.json lacks {error}; give a folder that `fastidc adapt` or `finetune` wrote."
            ) from None

    def all_records(self) -> dict[str, list]:
        """Split -> records; of the run's own data as the run read them, without what it left out. Raises FastidcError where the data are not there."""
        from fastidc.data.records import load_records, recognise

        if not self.data.exists():
            raise FastidcError(f"{self.data}: the data of {self.folder} are not there; say with --data where they are.")
        own = self.data == Path(str(self.settings.get("data")))
        how = {name: value for name in ("images", "empty") if own and (value := self.settings.get(name)) is not None}
        quarantines = [self.settings.get("quarantine"), left if (left := self.folder / "left_out.json").is_file() else None]
        how["quarantine"] = [one for one in quarantines if own and one is not None]
        return load_records(self.data, self.dataset if own else recognise(self.data), **how)

    def records(self, split: str) -> list:
        """The split's records. Raises FastidcError where the data are not there, or the split is empty or unknown."""
        from fastidc.data.records import SPLITS

        if split not in SPLITS:
            raise FastidcError(f"--split is {split!r}; one of {', '.join(SPLITS)} was expected.")
        records = self.all_records()[split]
        if not records:
            raise FastidcError(f"{self.data}: the {split} split is empty; choose another --split.")
        return records

    def written(self, split: str) -> tuple[dict[str, list[str]], dict[str, str]] | None:
        """References and captions that the run wrote for ``split``; None where it did not write both."""
        captions, references = self.folder / f"hyp_{split}.json", self.folder / "references.json"
        if not captions.is_file() or not references.is_file():
            return None
        hypotheses, known = read_results(captions), read_references(references)
        return (known, hypotheses) if hypotheses and not known.keys().isdisjoint(hypotheses) else None

    def model(self, device):
        """The run's model on ``device``."""
        from fastidc.model.clip4idc import CLIP4IDC

        return CLIP4IDC.from_pretrained(self.folder).to(device)

    def overlaps(self, pairs) -> dict[str, float] | None:
        """IoU of change pairs where the data have such a file."""
        file = self.data / _IOU_FILE
        return read_overlaps(file, [pair for pair in pairs if not is_no_change_id(pair)]) if file.is_file() else None


def caption_again(
    run: RunFolder, model, records: list, autocast: AbstractContextManager, beams: int, length_penalty: float
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """References and captions of ``records`` by ``model``, on its device, a bar beside. FastidcError: what it cannot do of ``beams``."""
    from tqdm import tqdm

    from fastidc.data.images import ImageStore
    from fastidc.evaluate.predict import predict_captions, references_of
    from fastidc.tokenizer import Tokenizer

    model.check_decoding(1, run.max_words, beams, length_penalty)
    total = sum(len(record.images) - 1 for record in records)
    with autocast, tqdm(total=total, desc="caption", unit="pair", leave=False, disable=None) as bar:
        hypotheses = predict_captions(
            model.eval(),
            Tokenizer.of(model.config),
            records,
            ImageStore(model.config.image_size),
            max_length=run.max_words,
            beams=beams,
            length_penalty=length_penalty,
            bar=bar,
        )
    return references_of(records), hypotheses


def similarity_of(run: RunFolder, model, records: list, autocast: AbstractContextManager):
    """(similarity [T, P] fp32, text_to_pair int64 [T]) of the change sentences of ``records`` against their pairs, as training scores them."""
    import torch
    from tqdm import tqdm

    from fastidc.data.images import ImageStore
    from fastidc.evaluate.predict import embed_pairs, embed_sentences, sentences_of
    from fastidc.tokenizer import Tokenizer

    distinct, rows, owner = sentences_of(records)
    total = sum(len(record.images) - 1 for record in records)
    model.eval()
    with torch.no_grad():
        with autocast, tqdm(total=total, desc="embed", unit="pair", leave=False, disable=None) as bar:
            pairs = embed_pairs(model, records, ImageStore(model.config.image_size), bar=bar)
            text = embed_sentences(model, Tokenizer.of(model.config), distinct, max_words=run.max_words)
        device = model.logit_scale.device
        return model.similarity(text.to(device), pairs.to(device)).float().cpu().numpy()[rows.numpy()], owner.numpy()


def about_change(hypotheses: Mapping[str, str], types: Mapping[str, str]) -> dict[str, Any]:
    """``change_accuracy`` where there are no-change pairs, and ``type_accuracy`` where the data have CLEVR's types."""
    from fastidc.evaluate.changes import CHANGE_TYPES

    result: dict[str, Any] = {}
    if any(is_no_change_id(pair) for pair in hypotheses):
        result["change_accuracy"] = change_accuracy(hypotheses)
    usable = {pair: kind for pair, kind in types.items() if pair in hypotheses}
    if usable and set(usable.values()) <= set(CHANGE_TYPES):
        result["type_accuracy"] = type_accuracy(hypotheses, usable)
    return result


def change_probabilities(folder: Path, split: str) -> dict[str, Any] | None:
    """``auc`` and ``calibration_error`` of ``change_SPLIT.json``, {image_id: p}; None where there is no such file.

    With a ``change_val.json`` beside it also ``calibrated_error``, by the scale and shift fitted there. Both kinds of pairs are needed.
    Raises FastidcError that names the file and the entry.
    """
    file, val = folder / f"change_{split}.json", folder / "change_val.json"
    if not file.is_file():
        return None
    values, changed = _labelled(read_probabilities(file))
    if len(set(changed)) < 2:
        raise FastidcError(f"{file}: all its pairs are of one kind; it needs pairs with a change and ids of pairs without one (..._n).")
    result = {"auc": auc(values, changed), "calibration_error": calibration_error(values, changed), "pairs": len(values)}
    if split != "val" and val.is_file():
        calibration = calibrate(*_labelled(read_probabilities(val)))
        result["calibrated_error"] = calibration_error(calibration(values), changed)
        result["calibration"] = {"scale": calibration.scale, "shift": calibration.shift, "fitted_on": "val"}
    return result


def read_probabilities(file: Path) -> dict[str, float]:
    """``change_SPLIT.json``: image_id -> p, not calibrated. Raises FastidcError that names the file and the entry."""
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise FastidcError(f"{file} is not readable JSON ({error}); write {{image_id: probability}} again.") from error
    if not isinstance(content, dict) or not content:
        raise FastidcError(f"{file}: is no object {{image_id: probability}} with an entry; write it again.")
    for pair, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise FastidcError(f"{file}: {pair!r} is {value!r}; give a number from 0 to 1.")
    return content


def _labelled(probabilities: Mapping[str, float]) -> tuple[list[float], list[bool]]:
    return list(probabilities.values()), [not is_no_change_id(pair) for pair in probabilities]
