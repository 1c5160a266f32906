"""SIGTERM and SIGINT at a random moment: the step is finished and saved, none is lost, and the run goes on to the same bits. Some come twice."""

import json
import random
import re
import signal
import time

from tests.faults.kills import EVERY
from tests.faults.tally import Tally
from tests.faults.toy import BATCH, STEPS, Ended, Toy, check_snapshots, shared

_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def check_first(tally: Tally, ended: Ended, number: signal.Signals, last: int) -> None:
    """What the first signal makes of a run: the step it says to go on after is the last one that was made, and the log has it."""
    if ended.code == -number:  # between the last file but one and the end of the process, when nothing is caught any more
        assert max(ended.of("saved")) == STEPS
        tally.add("after the last step")
        return
    assert ended.code == _CODES[number], f"exit code {ended.code}: {ended.said[-1500:]}"
    assert "Traceback" not in ended.said, ended.said[-1500:]
    told = re.search(rf"fastidc: {number.name} at step (\d+); (.*)\.\n", ended.said)
    assert told, ended.said[-1500:]
    made = max(ended.of("step"), default=0)
    assert int(told[1]) == made == last, f"{told[0]}; {made} steps were made, and the log has {last}"
    assert told[2].startswith("go on with --resume auto from"), told[2]
    tally.add("stopped and saved")


def term(toy: Toy, tally: Tally, seed: int) -> None:
    draw = random.Random(f"terms {seed}")
    stage, number = draw.choice(["adapt", "finetune"]), draw.choice([signal.SIGTERM, signal.SIGINT])
    alone = toy.alone(stage, save_every_steps=EVERY)
    line = toy.flags(stage, out := toy.folder(f"term-{seed}"), save_every_steps=EVERY)
    twice = seed % 5 == 4
    for _ in range(20):
        running = toy.begin(line)
        assert running.until("begun")
        time.sleep(draw.uniform(0, 0.7 * toy.seconds(stage)))
        running.send(number)
        if twice:
            time.sleep(draw.choice([0.0, draw.uniform(0, 0.01)]))
            running.send(number)
        ended = running.wait()
        if ended.code:
            break
        toy.check(out, alone, BATCH[stage])  # it came too late
    tally.add("signals")
    check_snapshots(out)
    if twice and ended.code == -number:
        tally.add("ended at once by the second")
    else:
        rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
        check_first(tally, ended, number, rows[-1]["step"] if rows else 0)
    before = max(ended.of("step"), default=0)
    after = toy.well(line).of("step")
    if not (twice and ended.code == -number):
        assert min(after, default=before + 1) == before + 1, "a step was made again"
    toy.check(out, alone, BATCH[stage])


def run(seed: int, count: int) -> dict:
    return Tally("terms", seed, count).each(lambda tally, number: term(shared(), tally, number))
