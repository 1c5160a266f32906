"""What serves each op, and what a training step has, by the functions that decide it."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from fastidc import ops  # noqa: F401 - defines the ops
from fastidc.config import PRESETS
from fastidc.errors import FastidcError
from fastidc.ops._dispatch import OPS, Op, Spec, arch_of, chosen_for
from fastidc.train.distributed import ALONE
from fastidc.train.optim import Stage
from fastidc.train.policy import DEAD_WORK, policy
from fastidc.train.precision import Precision, choose_precision
from fastidc.train.shadows import why_wide

# ViT-B/32's calls; longer towers are where libraries serve
_ATTENTION = {
    "intra, 50 tokens": {"query_length": 50, "key_length": 50},
    "inter, 100 tokens": {"query_length": 100, "key_length": 100},
    "packed captions": {"query_length": 32, "key_length": 32, "causal": True, "packed": True},
    "captioner with dropout": {"query_length": 32, "key_length": 100, "dropout": True},
    "ViT-B/16 inter, 394 tokens": {"query_length": 394, "key_length": 394},
}
_STAGES: dict[Stage, str] = {"adapt": "adaptation", "finetune": "captioning"}


def backends(device: str) -> dict[str, Any]:
    """{"device", "dtype", "calls": [{"call", "backend" or None, "said", "refusals": {backend: sentences}}]} of a training step's calls."""
    dtype = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if device == "cuda" else torch.float32
    calls: list[dict[str, Any]] = []
    for op in OPS.values():
        base = Spec(op.name, device, dtype, True, arch_of(torch.device(device)))
        specs = {op.name: base}
        if op.name == "attention":
            specs = {f"attention, {name}": base._replace(head_dim=64, **facts) for name, facts in _ATTENTION.items()}
        calls += [_call(op, name, spec) for name, spec in specs.items()]
    return {"device": device, "dtype": str(dtype).removeprefix("torch."), "calls": calls}


def _call(op: Op, name: str, spec: Spec) -> dict[str, Any]:
    refusals = {backend: sentences for backend, sentences in op.explain(spec).items() if sentences}
    wanted = chosen_for(op.name, "auto")
    try:
        return {"call": name, "backend": op.resolve(spec, wanted), "said": "", "refusals": refusals}
    except FastidcError as refusal:  # FASTIDC_BACKEND's choice
        return {"call": name, "backend": None, "said": str(refusal), "refusals": refusals}


def steps(device: str) -> list[dict[str, Any]]:
    """Of each stage by the official recipe in one process: what `fastidc.train.policy` decides, and in what gradients are kept."""
    precision = choose_precision("auto", torch.device(device))
    out = []
    for stage, name in _STAGES.items():
        recipe = getattr(PRESETS["clevr"], stage)
        found = policy(stage, device, precision.name, recipe)
        lines = [*found.lines(), f"gradients of shadowed weights: {_gradients(device, recipe, precision, found.shadows.active)}"]
        out.append({"stage": name, "device": device, "precision": precision.name, "lines": lines, "never": list(DEAD_WORK[stage])})
    return out


def _gradients(device: str, recipe: Any, precision: Precision, shadows: bool) -> str:
    if not shadows:
        return f"{'fp16' if precision.name == 'fp16-official' else 'fp32'}, as there are no shadows"
    place = SimpleNamespace(logit_scale=SimpleNamespace(device=torch.device(device)))  # of the model it asks for nothing else
    why = why_wide(cast(Any, place), recipe, precision, ALONE)
    return "bf16, as they are made" if why is None else f"fp32, since {why}"
