"""`fastidc doctor`: what is here, what each op runs on, and what each absence costs."""

import importlib.metadata
import shutil
import sys

import torch

import fastidc
from fastidc import ops  # noqa: F401 - defines the ops
from fastidc.config import PRESETS
from fastidc.errors import FastidcError
from fastidc.ops._dispatch import OPS, Op, Spec, arch_of, chosen_for
from fastidc.train.optim import Stage
from fastidc.train.policy import DEAD_WORK, policy
from fastidc.train.precision import choose_precision

_COSTS = {
    "triton": "no fused kernels; PyTorch's own serve",
    "cupy-cuda13x": "no CUDA C++ kernels (cupy-cuda12x serves CUDA 12)",
    "nvidia-dali-cuda130": "images are decoded by Pillow (nvidia-dali-cuda120 serves CUDA 12)",
    "xformers": "nothing: SDPA serves",
    "open_clip_torch": "no tokenizer and no open_clip:NAME/TAG weights; training and captioning need it",
    "pycocoevalcap": "no caption scores",
}

# ViT-B/32's calls; longer towers are where libraries serve
_ATTENTION = {
    "intra, 50 tokens": {"query_length": 50, "key_length": 50},
    "inter, 100 tokens": {"query_length": 100, "key_length": 100},
    "packed captions": {"query_length": 32, "key_length": 32, "causal": True, "packed": True},
    "captioner with dropout": {"query_length": 32, "key_length": 100, "dropout": True},
    "ViT-B/16 inter, 394 tokens": {"query_length": 394, "key_length": 394},
}


def report() -> str:
    """The report as text. Asks the driver for its devices; starts nothing else."""
    cuda = torch.cuda.is_available()
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if cuda else "none"
    lines = [
        f"fastidc {fastidc.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__} (CUDA {torch.version.cuda})",
        f"CUDA devices: {devices}",
        f"java: {shutil.which('java') or 'absent: METEOR is left out, and our own port of the PTB tokeniser serves'}",
        "",
    ]
    for package, cost in _COSTS.items():
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} absent: {cost}")
    device = "cuda" if cuda else "cpu"
    dtype = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if cuda else torch.float32
    lines += ["", f"backends on {device} in training, {str(dtype).removeprefix('torch.')}:"]
    for op in OPS.values():
        base = Spec(op.name, device, dtype, True, arch_of(torch.device(device)))
        specs = {op.name: base}
        if op.name == "attention":
            specs = {f"attention, {name}": base._replace(head_dim=64, **facts) for name, facts in _ATTENTION.items()}
        lines += _backends(op, specs)
    return "\n".join(lines + _training_step(device, choose_precision("auto", torch.device(device)).name))


_STAGES: dict[Stage, str] = {"adapt": "adaptation", "finetune": "captioning"}


def _training_step(device: str, precision: str) -> list[str]:
    """What a run by the official recipe in one process has of `fastidc.train.policy`, a stage at a time."""
    lines = []
    for stage, name in _STAGES.items():
        found = policy(stage, device, precision, getattr(PRESETS["clevr"], stage))
        lines += ["", f"a training step of {name} on {device}, {precision}, one process, official recipe:"]
        lines += [f"  {line}" for line in found.lines()]
        lines.append(f"  never computed, whatever the device: {'; '.join(DEAD_WORK[stage])}")
    return lines


def _backends(op: Op, specs: dict[str, Spec]) -> list[str]:
    """Which backend serves each call, and what the others refuse, each sentence once."""
    lines, said = [], set()
    wanted = chosen_for(op.name, "auto")
    for name, spec in specs.items():
        try:
            lines.append(f"  {name}: {op.resolve(spec, wanted)}")
        except FastidcError as refusal:  # FASTIDC_BACKEND's choice
            lines.append(f"  {name}: none; {refusal}")
        for backend, refusals in op.explain(spec).items():
            new = [sentence for sentence in refusals if (backend, sentence) not in said]
            said.update((backend, sentence) for sentence in new)
            lines += [f"    {backend}: {' '.join(new)}"] if new else []
    return lines
