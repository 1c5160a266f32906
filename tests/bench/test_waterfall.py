"""The rungs of the waterfall: each has one feature more than the one before it, through options that fastidc's stepper knows."""

import inspect

import pytest

from bench import waterfall
from bench.peers import ours

STAGES = ("adapt", "finetune")


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_each_rung_adds_a_feature(stage, bf16):
    rungs = waterfall.rungs(stage, bf16)
    options = list(rungs.values())
    assert next(iter(rungs)) == waterfall.PLAIN
    assert all(options), "with nothing taken away it would be fastidc itself"
    for more, less in zip(options, [*options[1:], {}], strict=True):
        assert more.items() > less.items()
    assert set(options[0]) <= set(inspect.signature(ours.build).parameters)
    assert ("precision" in options[0]) == bf16


@pytest.mark.parametrize("stage", STAGES)
def test_the_order_is_fixed(stage):
    rungs = list(waterfall.rungs(stage, True))
    names = {waterfall.OURS, "B idiomatic", "A official", "somebody else", *rungs}
    assert waterfall.order(names) == ["A official", "B idiomatic", *rungs, waterfall.OURS]
    assert all(waterfall.is_rung(name) for name in rungs)
    assert not waterfall.is_rung(waterfall.OURS)
    assert waterfall.last_feature(stage) not in rungs
