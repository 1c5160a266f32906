"""`fastidc export`: a run as a folder for others, without what belongs to the machine that made it."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidc import checkpoint
from fastidc.convert import check_free_folder, folder_aside
from fastidc.describe.no_change import NoChange
from fastidc.errors import FastidcError
from fastidc.files import parse_json, write_text
from fastidc.share.card import CARD_FILE, UNKNOWN, card

METRICS_FILE = "metrics.json"
FILES = (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, checkpoint.NO_CHANGE_FILE, CARD_FILE)
"""What `export` writes, and `fastidc.share.push` uploads."""
_OF_THIS_MACHINE = ("data", "images", "cache", "out")  # fields of a run that say where something lay


@dataclass(frozen=True)
class Exported:
    """What `export` did."""

    out: Path
    files: Mapping[str, int]
    """Name -> bytes."""
    parameters: int
    notes: tuple[str, ...]
    """Sentences: what the card cannot say."""

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.files.items())
        return "\n".join((f"wrote {self.out}: {self.parameters:,} parameters; {sizes}", *self.notes))


def export(
    run: str | os.PathLike,
    out: str | os.PathLike,
    *,
    licence: str | None = None,
    dataset: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the fastidc folder ``run`` to the folder ``out``: weights, config, no_change.json where there is one, and a model card.

    licence: that of the weights; "unknown" where it is None, which a sentence of the result says. dataset: what the data are called, which a run
    does not know: it knows their form. name: what the card calls the model, by
    default ``out``'s name. Paths of this machine are taken out of the config. The same run gives the same bytes. FastidcError where ``run`` is no
    finished run, or ``out`` exists (and not ``overwrite``) or holds anything that no export writes; nothing is then written.
    """
    run, out = Path(run), Path(out)
    check_free_folder(out, overwrite, FILES, "export")
    if not run.is_dir():
        raise FastidcError(f"{run}: no such run folder; give one, or write it first with `fastidc convert`.")
    if licence is not None and not licence.strip():
        raise FastidcError('--licence is empty; name the licence, as in --licence mit, or leave it out for "unknown".')
    if dataset is not None and not dataset.strip():
        raise FastidcError("--dataset is empty; name the data, as in --dataset CLEVR-Change, or leave it out.")
    read = checkpoint.read(run, keep_dtype=True)
    if read.fresh:
        raise FastidcError(
            f"{run}: lacks {read.fresh[0].rstrip('.')}, which no training has made yet; adapt it first (`fastidc adapt --init`)."
        )
    no_change = NoChange.of_run(run)
    metrics = _metrics(run)
    facts = public_facts(read.facts)
    name = name or Path(os.path.abspath(out)).name
    text = card(name, read.config, read.weights, facts, metrics, no_change, licence, dataset)
    with folder_aside(out) as aside:
        checkpoint.save(aside, read.config, read.weights, facts)
        if no_change is not None:
            shutil.copyfile(run / checkpoint.NO_CHANGE_FILE, aside / checkpoint.NO_CHANGE_FILE)
        write_text(aside / CARD_FILE, text)
    notes = []
    if licence is None:
        notes.append(f'the licence is given as "{UNKNOWN}", so nobody may use the model: say it with --licence, as in --licence mit.')
    if metrics is None:
        notes.append(f"{run} has no {METRICS_FILE}, so the card has no scores.")
    parameters = sum(tensor.numel() for tensor in read.weights.values())
    return Exported(out, {name: (out / name).stat().st_size for name in FILES if (out / name).is_file()}, parameters, tuple(notes))


def public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's config.json says beside the model's shape, without the paths of the machine: where its data lay goes, and of any other path the
    last part stays, so ``init`` still tells what it started from."""
    facts = dict(facts)
    if isinstance(facts.get("run"), dict):
        facts["run"] = {key: value for key, value in facts["run"].items() if key not in _OF_THIS_MACHINE}
        if isinstance(init := facts["run"].get("init"), str) and not _is_a_name(init):
            facts["run"]["init"] = _last_part(init)
    return _without_paths(facts)


def _is_a_name(source: str) -> bool:
    return source.startswith(("open_clip:", "hub:"))


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_without_paths(held) for held in value]
    if isinstance(value, str) and re.match(r"(/|~|\\\\|\.\.?[\\/]|[A-Za-z]:[\\/])", value):
        return _last_part(value)
    return value


def _metrics(run: Path) -> dict[str, Any] | None:
    path = run / METRICS_FILE
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastidcError(f"{path}: cannot be read as JSON ({error}); train again, or delete the file.") from None
    if not isinstance(values, dict) or not isinstance(values.get("splits", {}), dict):
        raise FastidcError(f"{path}: is not a run's metrics: field splits is missing; train again, or delete the file.")
    return values
