"""NaN and Inf where they can come from, and losses that jump: what is no number never reaches the weights, and the log counts it."""

import itertools
import json
import math
import shutil

import torch
from safetensors.torch import load_file

from fastidc.train import snapshot
from tests.faults.tally import Tally
from tests.faults.toy import STEPS, Ended, Toy, check_sentence, check_snapshots, shared

SITES = ("loss", "gradient", "last layer", "input", "activation", "scale")
WAYS = (
    ("adapt", {}),
    ("adapt", {"preset": "tiny"}),  # Muon and AdamW
    ("adapt", {"precision": "fp16"}),  # a scaled loss
    ("finetune", {}),
    ("finetune", {"precision": "fp16"}),
    ("finetune", {"precision": "bf16"}),
)
BAD, SPIKE = 6, 30
_ONE = [("one", *x) for x in itertools.product(SITES, ("nan", "inf"), range(len(WAYS)), ("stop", "rollback"))]
_COMPILED = [("one", site, value, None, policy) for site, value in zip(SITES, ("nan", "inf") * 3) for policy in ("stop", "rollback")]
_SEVERAL = [("several", site, value, way) for site, value in zip(SITES, ("inf", "nan") * 3) for way in (0, 3)]
CASES = [*_ONE, *_SEVERAL, ("spike", False), ("spike", True)]
_STRIDE = 37  # has no divisor in common with their number: a few cases in a row are spread over all


def leave_out(step: int) -> None:
    """That step's update is not made, and nothing else is different."""
    from fastidc.train.optim import Optimizer

    update = Optimizer.update

    def updated(self) -> torch.Tensor:
        if self.steps + 1 != step:
            return update(self)
        for p in self.parameters:
            p.grad = None
        if self.scaler.is_enabled():  # it halves its factor, as it does where it finds what is not finite
            state = self.scaler.state_dict()
            self.scaler.update(state["scale"] * state["backoff_factor"])
            self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})
        return torch.tensor(math.nan)

    Optimizer.update = updated


def poison(site: str, value: str, calls: list[int]) -> None:
    """The steps of these numbers, counted over the life of the process, meet ``value`` at ``site``."""
    from fastidc.train.engine import Trainer

    made, run, bad = [0], Trainer.run, float(value)

    def ran(self, ready):
        made[0] += 1
        if made[0] not in calls:
            return run(self, ready)
        hook = _hook(self.model, site, bad)
        try:
            return run(self, ready)
        finally:
            hook.remove()

    Trainer.run = ran


def _hook(model, site: str, bad: float):
    def one(x):
        x = x.clone()
        x.view(-1)[x.numel() // 2] = bad
        return x

    def column(block, given, out):
        """Of every token. (In adaptation the last block is not called as a module.)"""
        x, *rest = out if isinstance(out, tuple) else (out,)
        x = x.clone()
        x[..., 0] = bad
        return (x, *rest) if rest else x

    trained = [p for p in model.parameters() if p.requires_grad]
    if site == "loss":
        return model.register_forward_hook(lambda m, given, losses: {name: loss * bad for name, loss in losses.items()})
    if site == "input":
        return model.pair_encoder.patch_embed.register_forward_hook(lambda m, given, out: one(out))
    if site == "activation":
        return model.pair_encoder.blocks[0].register_forward_hook(column)
    if site == "gradient":
        return trained[len(trained) // 2].register_hook(one)
    if site == "last layer":
        return trained[-1].register_hook(lambda g: torch.full_like(g, bad))
    scale = model.logit_scale if model.logit_scale.requires_grad else next(p for p in reversed(trained) if p.dim() == 1)
    return scale.register_hook(lambda g: torch.full_like(g, bad))


def spike(step: int, trains: bool) -> None:
    """That step's loss is 100 times as high; with ``trains`` the one that is trained on, else the one that is told."""
    from fastidc.train.engine import Trainer

    run = Trainer.run

    def ran(self, ready):
        if self.optimizer.steps + 1 != step:
            return run(self, ready)
        if not trains:
            loss, norm = run(self, ready)
            return 100 * loss, norm
        hook = self.model.register_forward_hook(lambda m, given, losses: {name: 100 * loss for name, loss in losses.items()})
        try:
            return run(self, ready)
        finally:
            hook.remove()

    Trainer.run = ran


def rows_of(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def check_finite(out) -> None:
    """All that was saved."""
    check_snapshots(out)
    for path in out.rglob("*.safetensors"):
        if path.name != "random.safetensors":
            for name, x in load_file(path).items():
                assert bool(x.isfinite().all()), f"{path.name}: {name} is not finite"


def check_stopped(ended: Ended, out, step: int) -> None:
    check_sentence(ended)
    assert f"not finite at step {step}" in ended.said, ended.said[-500:]
    assert all(int(p.name[5:]) < step for p in snapshot.found(out / "snapshots")), "a snapshot was taken after it"
    check_finite(out)


def check_left_out(out, expected, precision: str) -> None:
    """As where that step's update was left out, and counted."""
    rows, others = rows_of(out), rows_of(expected)
    before = sum("skipped" in row for row in rows[: BAD - 1])
    assert rows[BAD - 1].get("skipped") == before + 1, f"not counted: {rows[BAD - 1]}"
    assert rows[BAD - 1]["grad_norm"] is None
    for row, other in zip(rows, others, strict=True):
        if row["step"] != BAD:
            assert row == other, f"step {row['step']} is {row} instead of {other}"
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes(), "the weights are others"
    check_finite(out)


def one(toy: Toy, tally: Tally, out, site: str, value: str, way: int | None, policy: str) -> None:
    stage, more = ("finetune", {"compile": "on"}) if way is None else WAYS[way]
    more = {**more, "save_every_steps": 2, "on_nonfinite": policy}
    ended = toy.run(toy.flags(stage, out, **more), [[__name__, "poison", {"site": site, "value": value, "calls": [BAD]}]], seconds=1200)
    scaled = more.get("precision") == "fp16"
    if ended.code == 0:
        assert policy == "rollback" or scaled, "it was to stop"
        expected = toy.alone(stage, [[__name__, "leave_out", {"step": BAD}]], seconds=1200, **more)
        check_left_out(out, expected, more.get("precision", "fp32"))
        tally.add("left out and counted")
    else:
        assert policy == "stop", f"exit code {ended.code}: {ended.said[-1500:]}"
        check_stopped(ended, out, BAD)
        tally.add("stopped, nothing saved")


def several(toy: Toy, tally: Tally, out, site: str, value: str, way: int) -> None:
    """Three in a row: back to the snapshot before, with half the rate."""
    stage, more = WAYS[way]
    line = toy.flags(stage, out, **more, save_every_steps=2, on_nonfinite="rollback", nonfinite_steps=3)
    toy.well(line, [[__name__, "poison", {"site": site, "value": value, "calls": [5, 6, 7]}]])
    told = json.loads((out / "metrics.json").read_text())["rollbacks"]
    assert [(found["to"], found["slowed"]) for found in told] == [(4, 0.5)], told
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] is not None and row["grad_norm"] is not None for row in rows)
    check_finite(out)
    tally.add("went back")


def jump(toy: Toy, tally: Tally, out, trains: bool) -> None:
    more = {"epochs": 10, "select": "last"}
    ended = toy.well(toy.flags("adapt", out, **more), [[__name__, "spike", {"step": SPIKE, "trains": trains}]])
    assert "losses stood far above those before" in ended.said
    rows, others = rows_of(out), rows_of(alone := toy.alone("adapt", **more))
    assert [row["step"] for row in rows if "spike" in row] == [SPIKE], rows
    if not trains:
        assert [row for row in rows if row["step"] != SPIKE] == [row for row in others if row["step"] != SPIKE]
        assert (out / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert [row["step"] for row in rows] == list(range(1, 41))
    check_finite(out)
    tally.add("spikes told")


def _run(name: str, cases: list, stride: int, seed: int, count: int) -> dict:
    tally, toy = Tally(name, seed, count), shared()
    assert math.gcd(stride, len(cases)) == 1
    for number in tally.seeds():
        with tally.case(number):
            kind, *rest = cases[number * stride % len(cases)]
            out = toy.folder(f"numbers-{number}")
            try:
                {"one": one, "several": several, "spike": jump}[kind](toy, tally, out, *rest)
            except Exception as error:
                raise AssertionError(f"{kind} {rest}: {str(error) or repr(error)}") from error
            shutil.rmtree(out)
    return tally.result()


def run(seed: int, count: int) -> dict:
    return _run("numbers", CASES, _STRIDE, seed, count)


def run_compiled(seed: int, count: int) -> dict:
    """The first one waits for the compiler, minutes where its cache is empty."""
    return _run("compiled", _COMPILED, 5, seed, count)
