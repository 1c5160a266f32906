"""One process or two, of which one is killed; the run goes on as one or as two, and the ledger has each sample once an epoch.

Every fourth time torchrun starts them, and starts them again by itself; else they are forked, which takes seconds less.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import runs
from safetensors.torch import load_file

from fastidc.train import snapshot
from fastidc.train.ledger import check_ledger
from tests.faults.tally import Tally
from tests.faults.toy import BATCH, ROOT, STEPS, Ended, Toy, check_snapshots, shared

EVERY = 2


def die_after(step: int) -> None:
    """A moment after that step, in the middle of what follows."""
    from fastidc.train.stage import StageRun

    on_step = StageRun.on_step

    def stepped(self, made) -> None:
        on_step(self, made)
        if made.number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StageRun.on_step = stepped


def together(toy: Toy, arguments: list[str], prepare: dict[int, list], seconds: float = 90) -> list[Ended]:
    """Two processes as torchrun would start them; ``prepare``: rank -> what `Toy.begin` takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    begun = []
    for rank in (0, 1):
        begun.append(toy.begin(arguments, prepare.get(rank, []), RANK=str(rank), LOCAL_RANK=str(rank), **place))
    return [running.wait(seconds) for running in begun]


def two_alone(toy: Toy, stage: str) -> Path:
    """What two processes leave that nothing interrupts."""
    out = toy.root / "two-alone"
    if not out.exists():
        for ended in together(toy, toy.flags(stage, out, save_every_steps=EVERY), {}):
            assert ended.code == 0, ended.said[-1500:]
    return out


def by_torchrun(toy: Toy, stage: str, out, step: int) -> None:
    """The second process dies in the first attempt; the second attempt goes on unasked."""
    line = toy.flags(stage, out, save_every_steps=EVERY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "FAULTS_STEP": str(step)}
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 300, "check": False, "cwd": ROOT}
    done = subprocess.run([*command, "-m", "tests.faults.worlds", *line], **how)
    assert done.returncode == 0, f"torchrun ended with {done.returncode}: {done.stderr[-2500:]}"
    assert "goes on after step" in done.stdout


def check_alike(out, alone, exactly: bool) -> None:
    if exactly:
        runs.check_same_run(out, alone)
    else:  # the tolerances of tests/train/test_resume_processes.py: two processes add in another order
        a, b = (load_file(path / "model.safetensors") for path in (alone, out))
        for name, x in a.items():
            assert x.shape == b[name].shape, name
            assert ((x - b[name]).abs() <= 2e-5 + 1e-3 * x.abs()).all(), name
        assert (out / "ledger.jsonl").read_bytes() == (alone / "ledger.jsonl").read_bytes(), "other samples"


def change(toy: Toy, tally: Tally, seed: int) -> None:
    draw = random.Random(f"worlds {seed}")
    stage, step = "adapt", draw.randint(1, STEPS)  # captions draw other dropout in another world
    before, after = [(2, 1), (1, 2), (2, 2)][seed % 3]
    out = toy.folder(f"world-{seed}")
    line = toy.flags(stage, out, save_every_steps=EVERY)
    by_itself = seed % 4 == 3
    exactly = by_itself or before == after
    try:
        if by_itself:
            by_torchrun(toy, stage, out, step)
            tally.add("torchrun started again")
        else:
            die = [[__name__, "die_after", {"step": step}]]
            first, dead = (toy.run(line, die), None) if before == 1 else together(toy, line, {1: die})
            if dead is None:
                assert first.code == -signal.SIGKILL, first.said[-1500:]
            else:
                assert dead.code == -signal.SIGKILL, dead.said[-1500:]
                assert first.code == 2, f"exit code {first.code}: {first.said[-1500:]}"
                assert "fastidc: process 0 of 2 lost another one" in first.said, first.said[-1500:]
                tally.add("the other one said so")
            check_snapshots(out)
            again = [toy.run(line)] if after == 1 else together(toy, line, {})
            for ended in again:
                assert ended.code == 0, f"exit code {ended.code}: {ended.said[-1500:]}"
            tally.add(f"{before} -> {after}")
        check_alike(out, two_alone(toy, stage) if exactly else toy.alone(stage, save_every_steps=EVERY), exactly)
        assert check_ledger(out / "ledger.jsonl", BATCH[stage], 4) == {"steps": STEPS, "epochs": 2, "samples": STEPS * BATCH[stage]}
        assert not snapshot.found(out / "snapshots")
    except Exception as error:
        raise AssertionError(f"{before} -> {after}, killed after step {step}: {str(error) or repr(error)}") from error
    shutil.rmtree(out)


def run(seed: int, count: int) -> dict:
    return Tally("worlds", seed, count).each(lambda tally, number: change(shared(), tally, number))


if __name__ == "__main__":  # one of torchrun's processes
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_after(int(os.environ["FAULTS_STEP"]))
    sys.exit(runs.main(sys.argv[1:]))
