"""What the official run leaves for going on: pytorch_opt.bin.{epoch}, and the scores of its epochs."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastidc.data.records import read_json
from fastidc.errors import FastidcError
from fastidc.files import aside, write_json
from fastidc.train.optim import Stage
from fastidc.train.session import Session

SELECTION_FILE = "selection.json"


def model_file(folder: Path, epoch: int) -> Path:
    return folder / f"pytorch_model.bin.{epoch}"


@dataclass(frozen=True)
class Resumed:
    """The contents of a pytorch_opt.bin.{epoch}; the official keys ``epoch``, ``optimizer_state_dict`` and ``loss``, and the stage."""

    epoch: int  # the last one that is done, from 0
    stage: Stage
    loss: float
    optimizer: dict  # `fastidc.train.optim.Optimizer.state_dict`
    run: dict  # what has to be the same for going on: see `check_same`
    model: str  # `digest` of the weights that belong to it


def digest(model: nn.Module) -> str:
    """A fingerprint of a model's parameters: names, dtypes and bits."""
    out = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        out.update(f"{name} {p.dtype} {list(p.shape)}".encode())
        out.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return out.hexdigest()


def run_facts(session: Session) -> dict:
    """What decides where in the data a step is, and what its numbers are."""
    recipe = session.recipe
    facts = {"batch_size": recipe.batch_size, "gradient_accumulation_steps": recipe.accumulate, "seed": recipe.seed}
    return facts | {"precision": session.precision.name, "steps_per_epoch": session.loader.steps}


def check_same(resumed: "Resumed", session: Session, source: str, model: str) -> None:
    """FastidcError where a run cannot go on from ``resumed``: another place in the data, other numbers, other weights."""
    for name, value in run_facts(session).items():
        if resumed.run.get(name) != value:
            way_out = "the data has changed" if name == "steps_per_epoch" else f"resume with --{name} {resumed.run.get(name)}"
            raise FastidcError(f"{source}: was written by a run with {name} {resumed.run.get(name)}, and this one has {value}; {way_out}.")
    if resumed.model != digest(session.model):
        raise FastidcError(
            f"{source}: does not belong to the weights in {model}; give --init_model the pytorch_model.bin.{resumed.epoch} beside it, or leave it out."
        )


def save_optimizer(folder: Path, state: Resumed) -> Path:
    """Writes pytorch_opt.bin.{epoch} aside and renames it."""
    path = folder / f"pytorch_opt.bin.{state.epoch}"
    values = {"epoch": state.epoch, "optimizer_state_dict": state.optimizer, "loss": state.loss, "stage": state.stage}
    values |= {"run": state.run, "model": state.model}
    with aside(path) as temporary, open(temporary, "xb") as file:
        torch.save(values, file)  # to an open file: given a name, torch writes that into the archive
    return path


def load_optimizer(path: str | os.PathLike) -> Resumed:
    """Reads what `save_optimizer` wrote; FastidcError where it is absent, damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such file; --resume_model takes a pytorch_opt.bin.* of this script.") from None
    except Exception as error:  # every damage has its own exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastidcError(f"{path}: cannot be read as an optimiser's state ({reason[:200]}); resume from an earlier one.") from None
    kinds = {"epoch": int, "optimizer_state_dict": dict, "loss": float, "stage": str, "run": dict, "model": str}
    if not isinstance(state, dict) or not set(kinds) <= set(state):
        raise FastidcError(f"{path}: not a pytorch_opt.bin.* of this script; the fields {', '.join(sorted(kinds))} were expected.")
    for name, kind in kinds.items():
        if not isinstance(state[name], kind):
            raise FastidcError(
                f"{path}: field {name} is a {type(state[name]).__name__}, a {kind.__name__} was expected; the file is damaged."
            )
    return Resumed(state["epoch"], state["stage"], state["loss"], state["optimizer_state_dict"], state["run"], state["model"])


class Selection:
    """Which epoch is the best so far; a later one wins ties, as officially. Kept beside the checkpoints, so that a resumed run knows."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.scores: list[dict] = []

    def take_up(self, folder: Path, last_epoch: int) -> None:
        """What ``folder`` knows of the epochs up to ``last_epoch``; FastidcError where they were scored on another split."""
        path = folder / SELECTION_FILE
        if not path.is_file():
            return
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("epochs"), list):
            raise FastidcError(f"{path}: not the scores of a run; delete the file to select among the epochs that follow.")
        if values.get("split") != self.split:
            raise FastidcError(
                f"{path}: the epochs so far were selected on {values.get('split')}, not on {self.split}; resume with the same --select."
            )
        for index, entry in enumerate(values["epochs"]):
            whole = isinstance(entry, dict) and isinstance(entry.get("epoch"), int) and isinstance(entry.get("file"), str)
            if not whole or not isinstance(entry.get("score"), int | float):
                raise FastidcError(
                    f"{path}: epochs[{index}] must have the numbers epoch and score and the text file; delete the file to go on without it."
                )
        self.scores = [entry for entry in values["epochs"] if entry["epoch"] <= last_epoch]

    def knows(self, epoch: int) -> bool:
        return any(entry["epoch"] == epoch for entry in self.scores)

    def add(self, epoch: int, score: float) -> None:
        self.scores.append({"epoch": epoch, "score": score, "file": str(model_file(self.folder, epoch))})

    def save(self) -> None:
        write_json(self.folder / SELECTION_FILE, {"split": self.split, "epochs": self.scores})

    @property
    def _best(self) -> int | None:
        """Place of the best among the scores; one of 0 is none, as officially."""
        best, place = 0.00001, None
        for i, entry in enumerate(self.scores):
            if entry["score"] >= best:
                best, place = entry["score"], i
        return place

    @property
    def best_epoch(self) -> int | None:
        return None if self._best is None else self.scores[self._best]["epoch"]

    @property
    def best_score(self) -> float:
        return 0.00001 if self._best is None else self.scores[self._best]["score"]

    @property
    def best_file(self) -> str:
        return "None" if self._best is None else self.scores[self._best]["file"]

    @property
    def stale(self) -> int:
        """Epochs in a row since the best."""
        return len(self.scores) - (0 if self._best is None else self._best + 1)
