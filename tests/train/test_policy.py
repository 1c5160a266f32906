"""Which accelerations a run has, and why not the others."""

from dataclasses import fields, replace

import pytest

from fastidc.config import PRESETS
from fastidc.errors import FastidcError
from fastidc.train.policy import DEAD_WORK, Policy, policy

RECIPE = PRESETS["clevr"].finetune


def of(stage="finetune", device="cuda", precision="bf16", recipe=RECIPE, processes=1, fsdp=False, **choices) -> Policy:
    return policy(stage, device, precision, recipe, processes, fsdp, **choices)


def active(found: Policy) -> set[str]:
    return {field.name for field in fields(found) if getattr(found, field.name).active}


def test_a_gpu_has_all_but_what_was_not_asked_for():
    assert active(of()) == {"compile", "graph", "shadows"}
    assert active(of("adapt")) == {"graph", "shadows"}
    assert active(of(precision="fp32")) == {"compile", "graph"}
    assert active(of(processes=2)) == {"compile", "shadows", "buckets"}
    assert active(of(processes=2, graph="on")) == {"compile", "shadows", "graph"}
    assert active(of(processes=2, fsdp=True)) == set()


def test_a_cpu_has_few():
    assert active(of(device="cpu")) == {"shadows"}
    assert active(of(device="cpu", precision="fp32", processes=2)) == set()
    assert active(of(device="cpu", compiling="on")) == {"compile", "shadows"}


@pytest.mark.parametrize(
    ("choices", "part", "why"),
    [
        ({"compiling": "off"}, "compile", "as asked for"),
        ({"stage": "adapt", "compiling": "on"}, "compile", "no captioner"),
        ({"fsdp": True, "processes": 2}, "compile", "breaks the graph"),
        ({"graph": "off"}, "graph", "as asked for"),
        ({"device": "cpu"}, "graph", "no launches to save"),
        ({"precision": "fp16"}, "graph", "loss scale"),
        ({"precision": "fp16-official"}, "graph", "rates from the host"),
        ({"recipe": replace(RECIPE, optimizer="muon")}, "graph", "muon takes its rates from the host"),
        ({"recipe": replace(RECIPE, optimizer="adamw")}, "graph", "adamw takes its rates from the host"),
        ({"fsdp": True, "processes": 2}, "shadows", "gathers weights for a block"),
        ({"fsdp": True, "processes": 2}, "buckets", "scatters gradients itself"),
        ({"graph": "on", "processes": 2}, "buckets", "a call of Python's"),
        ({"device": "cpu"}, "fp8", "and it cannot be"),
        ({"processes": 2}, "graph", "never tried"),
        ({"fsdp": True, "processes": 2}, "graph", "addresses of the moment"),
        ({"precision": "fp32"}, "shadows", "fp32 casts no weights"),
        ({}, "buckets", "one process"),
        ({}, "fp8", "not asked for"),
        ({"processes": 2, "precision": "fp32"}, "buckets", "averaged in fp32"),
        ({"processes": 2, "device": "cpu"}, "buckets", "nothing travels far"),
    ],
)
def test_reasons(choices, part, why):
    found = getattr(of(**choices), part)
    assert not found.active
    assert why in found.why


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"compiling": "on", "fsdp": True, "processes": 2}, "--compile on does not go with --fsdp"),
        ({"graph": "on", "device": "cpu"}, "--graph on cannot be: on cpu there are no launches to save; leave it out."),
        ({"graph": "on", "precision": "fp16"}, "--graph on cannot be: fp16 keeps"),
        ({"graph": "sometimes"}, "unknown --graph 'sometimes'; choose one of auto, on, off."),
        ({"compiling": "never"}, "unknown --compile 'never'"),
        ({"device": "cpu", "fp8": True}, "--fp8 cannot be: "),
        ({"precision": "fp32", "fp8": True}, "--fp8 cannot be: "),
    ],
)
def test_refusals(choices, sentence):
    with pytest.raises(FastidcError, match=sentence):
        of(**choices)


def test_every_part_has_a_line():
    lines = of().lines()
    assert len(lines) == len(fields(Policy))
    assert "CUDA graph of the step: on, a step is one launch" in lines
    assert all(": on, " in line or ": off, " in line for line in lines)
    assert set(DEAD_WORK) == {"adapt", "finetune"}
