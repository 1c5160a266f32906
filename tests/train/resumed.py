"""What each of two processes does for test_resume_processes.py; torchrun starts it. Arguments: data, start, out."""

import json
import os
import signal
import sys
from pathlib import Path

from runs import Killed, options, train, without_java

from fastidc.errors import Interrupted
from fastidc.train.distributed import World, processes
from fastidc.train.stage import StageRun

OFFICIAL = {"preset": "clevr", "lr": 1e-2, "coef_lr": 0.1, "batch_size": 4}


def at_step(step: int, do) -> None:
    """Once that step and what belongs to it is done."""
    original = StageRun.on_step

    def on_step(self, made) -> None:
        original(self, made)
        if made.number == step:
            StageRun.on_step = original
            do()

    StageRun.on_step = on_step


def dies() -> None:
    raise Killed


def killed(stage: str, data: Path, start: Path, out: Path, step: int = 3, **more) -> None:
    at_step(step, dies)
    try:
        train(stage, options(data, start, out, save_every_steps=2, **{**OFFICIAL, **more}))
    except Killed:
        return
    raise AssertionError("it was to die")


def stopped(world: World, data: Path, start: Path, out: Path) -> list:
    """The second process alone is told to end."""
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM) if world.rank == 1 else None)
    try:
        train("adapt", options(data, start, out, **OFFICIAL))
    except Interrupted as end:
        return [str(end), end.code]
    return []


def run() -> None:
    data, start, out = map(Path, sys.argv[1:])
    without_java()
    captions = {"token_mean": "global", "batch_size": 2}
    with processes("cpu") as (world, _):  # every run below uses this group
        for stage, name, more in (("adapt", "ddp", {}), ("adapt", "fsdp", {"fsdp": True}), ("finetune", "captions", captions)):
            train(stage, options(data, start, out / name, **{**OFFICIAL, **more}))
            killed(stage, data, start, out / f"{name}-again", **more)
            train(stage, options(data, start, out / f"{name}-again", resume="auto", **{**OFFICIAL, **more}))
        killed("adapt", data, start, out / "two-one")
        killed("adapt", data, start, out / "shared-one", fsdp=True)
        train("adapt", options(data, start, out / "one-two", resume="auto", **OFFICIAL))
        train("adapt", options(data, start, out / "one-shared", resume="auto", fsdp=True, **OFFICIAL))
        facts = stopped(world, data, start, out / "stopped")
        train("adapt", options(data, start, out / "stopped", resume="auto", **OFFICIAL))
    (out / f"rank{world.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run()
