"""What the official run leaves for going on: pytorch_opt.bin.{epoch}, and the scores of its epochs."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastidc.data.records import read_json
from fastidc.errors import FastidcError
from fastidc.files import write_json
from fastidc.train.optim import Stage

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


def save_optimizer(folder: Path, state: Resumed) -> Path:
    """Writes pytorch_opt.bin.{epoch} aside and renames it."""
    path = folder / f"pytorch_opt.bin.{state.epoch}"
    aside = folder / f".{path.name}.{os.getpid()}"
    values = {"epoch": state.epoch, "optimizer_state_dict": state.optimizer, "loss": state.loss, "stage": state.stage}
    try:
        torch.save(values, aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise FastidcError(f"{path}: cannot be written ({error.strerror or error}).") from None
    return path


def load_optimizer(path: str | os.PathLike) -> Resumed:
    """Reads what `save_optimizer` wrote; FastidcError where it is absent, damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such file; --resume_model takes a pytorch_opt.bin.* of this script.") from None
    except Exception as error:  # every damage has its own exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FastidcError(f"{path}: cannot be read as an optimiser's state ({reason[0][:200]}).") from None
    keys = {"epoch", "optimizer_state_dict", "loss", "stage"}
    if not isinstance(state, dict) or not keys <= set(state):
        raise FastidcError(f"{path}: not a pytorch_opt.bin.* of this script; the fields {', '.join(sorted(keys))} were expected.")
    return Resumed(state["epoch"], state["stage"], state["loss"], state["optimizer_state_dict"])


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
