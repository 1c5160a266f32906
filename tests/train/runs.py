"""Runs of seconds for tests of what interrupts one: a model of a few thousand weights, and what two runs must have in common."""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import torch
import worlds

from fastidc import checkpoint
from fastidc.cli import main
from fastidc.config import ModelConfig, TrainOptions
from fastidc.data.records import all_captions, load_records
from fastidc.evaluate import captions, ptb
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import vocabulary_of
from fastidc.train import judge, snapshot
from fastidc.train.run import train
from fastidc.train.stage import StageRun

SPLITS = {"train": list(range(9)), "val": [20, 21], "test": [30, 31]}


def without_java() -> None:
    """Captions are scored by what starts in no time; the numbers are the same on these sentences."""
    judge.score_by_subset = functools.partial(judge.score_by_subset, meteor=False)
    captions.tokenize = lambda sentences, tokenizer: ([ptb.ptb_regex(sentence) for sentence in sentences], "ptb-regex", None)


class Killed(BaseException):
    """In the place of a SIGKILL, for tests in one process."""


def world(root: Path) -> tuple[Path, Path]:
    """A data set of nine scenes, and a run folder with random weights to start from; a captioner made for it has dropout."""
    data = worlds.clevr_tree(root / "data", SPLITS)
    ids = vocabulary_of(all_captions(load_records(data)["train"]))
    shape = {"image_size": 32, "patch_size": 16, "vision_width": 32, "vision_layers": 2, "intra_layers": 1, "embed_dim": 32, "head_dim": 16}
    config = ModelConfig(**shape, text_layers=1, context_length=32, captioner_layers=0, vocabulary=ids, vocab_size=len(ids))
    torch.manual_seed(7)
    model = CLIP4IDC(config)
    checkpoint.save(root / "start", config, dict(model.named_parameters()), {"preset": "tiny"})
    return data, root / "start"


def options(data: Path, start: Path, out: Path, **more) -> TrainOptions:
    """Of two epochs of four steps each, in captioning."""
    usual = {"batch_size": 2, "epochs": 2, "select": "val", "device": "cpu", "precision": "fp32", "workers": 1, "seed": 5}
    return TrainOptions(data=data, out=out, **{"init": str(start), **usual, **more})


def kill_after(monkeypatch, step: int, before: bool = False) -> None:
    """The run in this process dies when that step and what belongs to it is done; or ``before`` anything is written of it."""
    original = StageRun.on_step

    def on_step(self, made) -> None:
        if made.number == step and before:
            raise Killed
        original(self, made)
        if made.number == step:
            raise Killed

    monkeypatch.setattr(StageRun, "on_step", on_step)


def left(out: Path) -> dict:
    """What a finished run left, but for the time it took and how it was started."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    names = [p.name for p in out.iterdir() if p.name not in ("log.jsonl", "config.json")]
    return {"rows": rows} | {name: (out / name).read_bytes() for name in names}


def check_same_run(got: Path, expected: Path) -> None:
    one, other = left(got), left(expected)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], f"{name} of a run that went on differs"


__all__ = ["Killed", "check_same_run", "kill_after", "left", "options", "train", "world"]


if __name__ == "__main__":  # a run that a test can kill: stage, out and options as JSON
    without_java()
    if "--in-save" in sys.argv:  # the end comes while a snapshot is written
        at, sync = int(sys.argv.pop(sys.argv.index("--in-save") + 1)), snapshot._sync
        sys.argv.remove("--in-save")
        seen = []

        def slow(file: Path) -> None:
            sync(file)
            seen.append(file)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        snapshot._sync = slow
    sys.exit(main(sys.argv[1:]))
