"""A process that has imported everything and forks one child a run, so that a run takes half a second and not five.

It never computes: what torch's threads hold is lost in a fork. It reads a line of JSON a request from its standard input,
{"arguments": [...], "log": FILE, "notes": FILE, "prepare": [["module", "function", {...}], ...], "environment": {...}} or {"wait": PID, "seconds": S},
and answers with a line each: a process number, or the exit code (the signal's number below 0), null where the process still runs.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback

import torch

import tests.faults

import open_clip  # isort: skip
import runs
from safetensors import torch as _torch_files

import fastidc.commands.train
from fastidc.cli import main
from fastidc.describe import Describer
from fastidc.train import run, snapshot
from fastidc.train.signals import Signals
from fastidc.train.stage import StageRun

__all__ = ["Describer", "_torch_files", "fastidc", "open_clip", "run"]


def _takes_notes(path: str) -> None:
    """A line at once in ``path`` for what happens: "begun" when signals are caught, "step 3", "saving 3" and "saved 3"."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(line: str) -> None:
        os.write(file, f"{line}\n".encode())

    on_step, enter, write = StageRun.on_step, Signals.__enter__, snapshot.write

    def stepped(self, made) -> None:
        note(f"step {made.number}")
        on_step(self, made)

    def entered(self):
        caught = enter(self)
        note("begun")
        return caught

    def written(folder, step, *rest):
        note(f"saving {step}")
        path = write(folder, step, *rest)
        note(f"saved {step}")
        return path

    StageRun.on_step, Signals.__enter__, snapshot.write = stepped, entered, written


def _child(job: dict) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: none outlives the server
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for file, onto in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(file, onto)
    os.environ.update(job["environment"])
    try:
        _takes_notes(job["notes"])
        for module, function, values in job["prepare"]:
            getattr(importlib.import_module(module), function)(**values)
        return main(job["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for do in tests.faults.at_end:
            do()
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def serve() -> None:
    torch.set_num_threads(1)
    runs.without_java()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = _wait(job["wait"], job["seconds"])
        elif not (answer := os.fork()):
            os._exit(_child(job))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
