"""A run of three epochs that dies after a step, each of them once, and goes on: with accumulation, other workers, another loader."""

import os
import random
import signal

from tests.faults.tally import Tally
from tests.faults.toy import BATCH, Toy, check_snapshots, shared

EPOCHS = 3
# (stage, its flags, what is different where it goes on)
WAYS = {
    "adaptation": ("adapt", {}, {}),
    "captioning": ("finetune", {}, {}),
    "accumulated": ("adapt", {"accumulate": 2}, {}),
    "other workers": ("finetune", {}, {"workers": 3}),
    "from a cache": ("finetune", {}, {"loader": "cache", "workers": 2}),
    "by DALI": ("finetune", {}, {"loader": "dali"}),
}
CASES = [(way, step) for step in range(1, 4 * EPOCHS + 1) for way in WAYS]


def die_after(step: int) -> None:
    """When that step and what belongs to it is done."""
    from fastidc.train.stage import StageRun

    on_step = StageRun.on_step

    def stepped(self, made) -> None:
        on_step(self, made)
        if made.number == step:
            self.keeper.finish()  # the snapshot of this step is on the disk
            os.kill(os.getpid(), signal.SIGKILL)

    StageRun.on_step = stepped


def cache(toy: Toy):
    path = toy.root / "cache-32.bin"
    if not path.exists():
        toy.well(["cache", "build", "--data", str(toy.data), "--out", str(path), "--size", "32"])
    return path


def resume(toy: Toy, tally: Tally, seed: int, way: str, step: int) -> None:
    stage, more, again = WAYS[way]
    if again.get("loader") == "cache":
        again = {**again, "cache": cache(toy)}
    more = {**more, "epochs": EPOCHS, "save_every_steps": 1}
    alone = toy.alone(stage, **more)
    out = toy.folder(f"step-{seed}")
    ended = toy.run(toy.flags(stage, out, **more), [[__name__, "die_after", {"step": step}]])
    assert ended.code == -signal.SIGKILL, ended.said[-1500:]
    check_snapshots(out)
    made = toy.well(toy.flags(stage, out, **{**more, **again})).of("step")
    assert made == list(range(step + 1, 4 * EPOCHS + 1)), f"went on with {made}"
    toy.check(out, alone, BATCH[stage])
    tally.add(way)


def run(seed: int, count: int) -> dict:
    tally = Tally("every_step", seed, count)
    ways = [case for case in CASES if case[0] != "by DALI" or _has_dali()]
    random.Random("every step").shuffle(ways)
    tally.notes["cases"] = len(ways)
    for number in tally.seeds():
        with tally.case(number):
            way, step = ways[number % len(ways)]
            try:
                resume(shared(), tally, number, way, step)
            except Exception as error:
                raise AssertionError(f"{way} after step {step}: {str(error) or repr(error)}") from error
    return tally.result()


def _has_dali() -> bool:
    try:
        import nvidia.dali
    except ImportError:
        return False
    return nvidia.dali is not None
