"""How numbers are held and multiplied in training: five ways, one name each (clip4idc.md 1.3 and 5.4)."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fastidc.checkpoint import is_half_officially
from fastidc.errors import FastidcError

PRECISIONS = ("bf16", "fp16", "fp32", "fp16-official")


@dataclass(frozen=True)
class Precision:
    """One of `PRECISIONS` on one kind of device.

    bf16           bf16 products over fp32 masters
    fp16           fp16 products over fp32 masters, the loss scaled so that small gradients survive: for GPUs before Ampere
    fp32           everything in fp32
    fp16-official  what the official code does: the towers' matrices, their gradients and both Adam moments are fp16, with neither masters
                   nor loss scaling; the captioner, norms, tables and embeddings are fp32
    """

    name: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """In which the towers multiply."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(self.name, torch.float16)

    def autocast(self):
        """The context in which the model runs."""
        return torch.autocast(self.device, dtype=self.dtype) if self.name in ("bf16", "fp16") else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in "fp16"; elsewhere it does nothing."""
        return torch.amp.GradScaler(self.device, enabled=self.name == "fp16")

    def prepare(self, model: nn.Module) -> None:
        """Gives the model's parameters the dtypes in which they train."""
        for name, parameter in model.named_parameters():
            half = self.name == "fp16-official" and is_half_officially(name)
            parameter.data = parameter.data.to(torch.float16 if half else torch.float32)
            parameter.grad_dtype = parameter.dtype  # shadows of an earlier run may have left another

    def advice(self, clip_lr: float) -> str | None:
        """A sentence for those who bring the official rate to a mode in which it means something else; None where there is nothing to say.

        In fp16 the second moment of the towers underflows to 0, so their update is m / 1.0133e-6: momentum SGD on clipped gradients at
        ``0.0987 * (lr / 1e-7)``, not Adam. Clipped gradients have an RMS of at most 9e-5 over ViT-B/32's 123 million half elements, so
        such a step moves a weight by up to 9e-6; an fp32 Adam at 1e-7 moves it by about 1e-7.
        """
        if self.name == "fp16-official" or not 0 < clip_lr <= 5e-7:
            return None
        return (
            f"CLIP's rate is {clip_lr:g}: the official recipe has that rate for --precision fp16-official, where it acts like 1e-6 to 1e-5 does "
            f"over fp32 masters; with {self.name} try --coef_lr 0.03 (3e-6 at --lr 1e-4), or the towers will hardly move."
        )


def choose_precision(name: str, device: torch.device) -> Precision:
    """ "auto" is bf16 where the device multiplies it in hardware, fp16 on a GPU that has only that (Volta, Turing), else fp32."""
    if name not in ("auto", *PRECISIONS):
        raise FastidcError(f"unknown precision {name!r}; choose one of auto, {', '.join(PRECISIONS)}.")
    if name != "auto":
        return Precision(name, device.type)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "cuda")
        return Precision("fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32", "cuda")
    amx, avx = (getattr(torch.cpu, probe, lambda: False) for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return Precision("bf16" if amx() or avx() else "fp32", device.type)
