"""What a run is, and what of that has to be the same for it to go on: what it computes and on which data; not how many processes, threads or which
loader do so."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastidc.config import Preset, TrainOptions
from fastidc.data.quarantine import Quarantine
from fastidc.data.records import PairRecord
from fastidc.errors import FastidcError
from fastidc.train.session import Session

RECIPE_OPTIONS = (
    "epochs", "steps", "batch_size", "accumulate", "micro_batch", "lr", "coef_lr", "freeze_layers", "max_words", "seed", "select", "gather_grad", "token_mean", "augment",
)  # fmt: skip
"""Fields of `TrainOptions` that replace the recipe's field of their name."""


def identity(
    session: Session, dataset: str, records: Mapping[str, Sequence[PairRecord]], fp8: bool, left_out: Quarantine | None = None
) -> dict[str, Any]:
    """Of this run, in JSON's types: stage, dataset, precision, the recipe's and the model's fields, and a fingerprint of the data and of what of them
    ``left_out`` holds."""
    data = {split: _of_split(part, whole=split == "train") for split, part in records.items()}
    values = {
        "stage": session.stage,
        "dataset": dataset,
        "precision": session.precision.name,
        "fp8": fp8,
        "recipe": dataclasses.asdict(session.recipe),
        "left_out": of_left_out(left_out),
        "data": data,
        "model": session.model.config.to_dict(),
    }
    return json.loads(json.dumps(values))


def of_left_out(held: Quarantine | None) -> str | None:
    """ "3 pairs, fingerprint 1f0c...", whatever their reasons; None where it is none, so that earlier snapshots, which say nothing, are of all pairs."""
    if held is None or not held.pairs:
        return None
    out = hashlib.blake2b(json.dumps(sorted(held.pairs)).encode(), digest_size=8)
    return f"{len(held.pairs)} pair{'s' * (len(held.pairs) != 1)}, fingerprint {out.hexdigest()}"


def _of_split(records: Sequence[PairRecord], whole: bool) -> str:
    """ "40 scenes, fingerprint 1f0c...": of ids, and where it is trained on of image names and sentences, all in their order."""
    out = hashlib.blake2b(digest_size=8)
    for record in records:
        parts: list[Any] = [record.id]
        if whole:
            # not the folder: data may be moved
            parts += [[path.name for path in record.images], list(record.captions), list(record.no_change_captions)]
        out.update(json.dumps(parts).encode())
    return f"{len(records)} scenes, fingerprint {out.hexdigest()}"


def check_same(theirs: Any, mine: Mapping[str, Any], source: str) -> None:
    """FastidcError naming the first field in which a snapshot's identity is not this run's, both values and the way out."""
    if not isinstance(theirs, dict):
        raise FastidcError(f"{source}: does not say of which run it is; resume from another one.")
    for field, saved, now in _differences(theirs, mine):
        raise FastidcError(
            f"{source}: was written by a run with {field.replace('.', ' ')} {_brief(saved)}, and this one has {_brief(now)}; {_way_out(field, saved)}."
        )


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any, Any]]:
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        saved, now = theirs.get(name), mine.get(name)
        if isinstance(saved, dict) and isinstance(now, dict):
            yield from _differences(saved, now, f"{above}{name}.")
        elif saved != now:
            yield f"{above}{name}", saved, now


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _way_out(field: str, saved: Any) -> str:
    anew = "or begin anew in another --out"
    group, _, name = field.partition(".")
    if group == "left_out":
        return f"resume with the --on-bad-data and the left_out.json that it began with, {anew}"
    if group == "data":
        return f"the data has changed: give the --data that it began with, {anew}"
    if group in ("precision", "dataset") or (group == "recipe" and name in RECIPE_OPTIONS):
        flag = (name or group).replace("_", "-")
        return f"resume {'without' if saved is None else 'with'} --{flag}{'' if saved is None else f' {saved}'}, {anew}"
    return f"resume with the command that it began with, {anew}"


def facts(options: TrainOptions, chosen: Preset, dataset: str, session: Session) -> dict[str, Any]:
    """What config.json says of a run besides its model: how it was started and what is at work."""
    return {
        "stage": session.stage,
        "preset": chosen.name,
        "recipe": dataclasses.asdict(session.recipe),
        "run": {
            "data": str(options.data),
            "loader": session.loader.images.name,
            "dataset": dataset,
            "images": None if options.images is None else str(options.images),
            "empty": options.empty,
            "quarantine": None if options.quarantine is None else str(options.quarantine),
            "on_bad_data": options.on_bad_data,
            "init": options.init,
            "device": session.device.type,
            "precision": session.precision.name,
            "processes": session.world.size,
            "fsdp": options.fsdp,
            "step": {field.name: getattr(session.policy, field.name).active for field in dataclasses.fields(session.policy)},
            "fp8_products": session.fp8_products,
            "beams": options.beams,
            "length_penalty": options.length_penalty,
            "steps": session.total_steps,
            "torch": torch.__version__,
        },
    }
