"""The rungs of the waterfall: each has one feature more than the one before it, through options that fastidc's stepper knows."""

import inspect

import pytest

from bench import waterfall
from bench.peers import ours

STAGES = ("adapt", "finetune")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_each_rung_adds_a_feature(stage, bf16, device):
    rungs = waterfall.rungs(stage, bf16, device)
    options = [_flat(rung) for rung in rungs.values()]
    assert next(iter(rungs)) == waterfall.PLAIN
    assert all(options), "with nothing taken away it would be fastidc itself"
    for more, less in zip(options, [*options[1:], set()], strict=True):
        assert more > less
    assert set(rungs[waterfall.PLAIN]) <= set(inspect.signature(ours.build).parameters)
    assert ("precision" in rungs[waterfall.PLAIN]) == bf16
    assert ("graph" in rungs[waterfall.PLAIN]) == (device == "cuda"), "a feature that no case can have has no bar"


def _flat(options: dict) -> set[tuple]:
    """Options one by one, also those of the backends."""
    backends = [("backends", part) for part in options.get("backends", "").split(",") if part]
    return {(key, value) for key, value in options.items() if key != "backends"} | set(backends)


@pytest.mark.parametrize("stage", STAGES)
def test_the_order_is_fixed(stage):
    rungs = list(waterfall.rungs(stage, True, "cuda"))
    names = {waterfall.OURS, "B idiomatic", "A official", "somebody else", *rungs}
    assert waterfall.order(names) == ["A official", "B idiomatic", *rungs, waterfall.OURS]
    assert all(waterfall.is_rung(name) for name in rungs)
    assert not waterfall.is_rung(waterfall.OURS)
    assert waterfall.last_feature(stage, True, "cuda") == "fastidc +graph"
    assert waterfall.last_feature(stage, True, "cuda") not in rungs
