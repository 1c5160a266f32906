"""Training with the products of blocks and captioner in FP8: what can, and which layers do (`fastidc.ops.fp8_linear` says how)."""

import torch
from torch import nn

from fastidc.model.layers import Linear
from fastidc.ops.fp8_linear import LEAST_ROWS, fits, gains, unsupported


def refusals(device: torch.device, precision: str, fsdp: bool = False, *, on_cpu: bool = False) -> list[str]:
    """Why a run on ``device`` in ``precision`` (a name of `fastidc.train.precision.PRECISIONS`) cannot have FP8 products, in sentences; none where
    it can. on_cpu: a CPU will do, as in tests and in the accuracy gate's small form."""
    out = []
    if device.type == "cpu" and not on_cpu:
        out.append("FP8 products need a CUDA device of compute capability 8.9 or higher (Ada, Hopper); a CPU would be slower with them.")
    elif device.type != "cuda" or torch.cuda.is_available():
        out += unsupported(device)
    if precision != "bf16":
        out.append(f"FP8 products take the place of bf16 ones, and this run multiplies in {precision}.")
    if fsdp:
        out.append("FP8 products were not tried with --fsdp, whose gathers are of whole weights.")
    return out


def enable_fp8(model: nn.Module, *, everything: bool = False) -> int:
    """Has products of ``model``'s blocks and captioner run in FP8 in training, where they would be in bf16; returns how many layers have them. It
    takes a weight that trains, in widths that are multiples of 16, and a gain by `fastidc.ops.fp8_linear.LEAST_WIDTH`, and of a batch
    `LEAST_ROWS` rows. everything: also where there is nothing to gain, as in tests and in the accuracy gate.

    Evaluation, the stem, projections and the word table's product stay as they were. Which weights train is marked by
    `fastidc.train.optim.Optimizer`, so this comes after it; no other model changes.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    layers = [layer for layer in linears if layer.weight.requires_grad and fits(layer.weight) and (everything or gains(layer.weight))]
    for layer in layers:
        layer.fp8_rows = 1 if everything else LEAST_ROWS
    return len(layers)
