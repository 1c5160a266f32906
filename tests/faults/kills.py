"""SIGKILL at a random moment, or inside a save: the same command goes on and ends with the same bits, and at most an interval is made again."""

import os
import random
import signal
import time

from tests.faults.tally import Tally
from tests.faults.toy import BATCH, Running, Toy, check_snapshots, shared

EVERY = 2  # steps between snapshots
_FILES = 5  # that a snapshot brings to the disk, each of them a moment to die at


def die_in_save(at: int) -> None:
    """The end comes when so many files of snapshots are on the disk; in the process itself."""
    from fastidc.train import snapshot

    sync, seen = snapshot._sync, []

    def counted(file) -> None:
        sync(file)
        seen.append(file)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    snapshot._sync = counted


def after_a_while(running: Running, seconds: float) -> None:
    time.sleep(seconds)
    running.send(signal.SIGKILL)


def check_loss(tally: Tally, before: list[str], after: list[str]) -> None:
    """An interval is made again, and where the snapshot before was still being written, what was made meanwhile. The next one waits for it, so
    that is never more than another interval."""

    def steps(kind: str, notes: list[str]) -> list[int]:
        return [int(line.split()[1]) for line in notes if line.startswith(f"{kind} ")]

    made = max(steps("step", before), default=0)
    if made == 0:
        return
    first = min(steps("step", after), default=made + 1)
    lost = max(0, made - first + 1)
    saving, saved = steps("saving", before), steps("saved", before)
    inside = bool(saving) and max(saving) != max(saved, default=0)
    tally.most("most steps made again", lost)
    tally.add("killed while a snapshot was written", int(inside))
    assert lost <= (2 * EVERY if inside else EVERY), f"{lost} of {made} steps were made again, and one snapshot is {EVERY} steps"


def kill(toy: Toy, tally: Tally, seed: int) -> None:
    draw = random.Random(f"kills {seed}")
    stage = draw.choice(["adapt", "finetune"])
    alone = toy.alone(stage, save_every_steps=EVERY)
    out = toy.folder(f"kill-{seed}")
    line = toy.flags(stage, out, save_every_steps=EVERY)
    inside = seed % 4 == 0
    notes: list[str] = []
    wanted = draw.choice([1, 1, 1, 2, 3])  # what goes on can be killed again
    for attempt in range(20):
        prepare = [[__name__, "die_in_save", {"at": draw.randint(1, (4 if attempt == 0 else 2) * _FILES)}]] if inside else []
        running = toy.begin(line, prepare)
        if not inside:
            after_a_while(running, draw.uniform(0, toy.seconds(stage) * (0.9 if attempt == 0 else 0.6)))
        ended = running.wait()
        assert ended.code in (0, -signal.SIGKILL), f"exit code {ended.code}: {ended.said[-1500:]}"
        check_loss(tally, notes, ended.notes)
        notes = ended.notes
        check_snapshots(out)
        if ended.code == 0:  # it came too late
            toy.check(out, alone, BATCH[stage])
            notes = []
            continue
        tally.add("kills")
        tally.add("inside a save", int(inside))
        wanted -= 1
        if wanted == 0:
            break
    ended = toy.well(line)
    check_loss(tally, notes, ended.notes)
    toy.check(out, alone, BATCH[stage])


def run(seed: int, count: int) -> dict:
    return Tally("kills", seed, count).each(lambda tally, number: kill(shared(), tally, number))
