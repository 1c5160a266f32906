"""`fastidc doctor`: what is here, what each op runs on, and what each absence costs."""

import importlib.metadata
import shutil
import sys

import torch

import fastidc
from fastidc import ops  # noqa: F401 - defines the ops
from fastidc.ops._dispatch import OPS, Spec

_COSTS = {
    "triton": "no fused kernels; PyTorch's own serve",
    "cupy-cuda13x": "no CUDA C++ kernels (cupy-cuda12x serves CUDA 12)",
    "nvidia-dali-cuda130": "images are decoded by Pillow (nvidia-dali-cuda120 serves CUDA 12)",
    "xformers": "nothing: SDPA serves",
    "open_clip_torch": "no tokenizer and no open_clip:NAME/TAG weights; training and captioning need it",
    "pycocoevalcap": "no caption scores",
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
    lines += ["", f"backends on {device} in training, fp32:"]
    for op in OPS.values():
        spec = Spec(op.name, device, torch.float32, True, head_dim=64, query_length=50, key_length=50)
        answers = op.explain(spec)
        chosen = next(name for name in op.order(spec) if not answers[name])
        lines.append(f"  {op.name}: {chosen}")
        lines += [f"    {name}: {' '.join(refusals)}" for name, refusals in answers.items() if refusals]
    return "\n".join(lines)
