"""One training step and the loop around it."""

import ctypes
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastidc.data.loaders import PairBatch, PairLoader
from fastidc.errors import FastidcError
from fastidc.train.objectives import Objective
from fastidc.train.optim import Optimizer


def choose_precision(name: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the device multiplies it in hardware, else "fp32"; an explicit name is kept."""
    if name not in ("auto", "bf16", "fp32"):
        raise FastidcError(f"unknown precision {name!r}; choose one of auto, bf16, fp32.")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    amx, avx = (getattr(torch.cpu, probe, lambda: False) for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return "bf16" if amx() or avx() else "fp32"


def keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next step: giving it back and faulting it in again costs a CPU step about 10%.

    Elsewhere (another C library) it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def autocast(device: torch.device, precision: str):
    """The context in which a model runs: bf16 products over fp32 masters, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def training_step(
    model, batch: PairBatch, objectives: Sequence[Objective], optimizer: Optimizer, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Forward, backward, update. Returns the loss and the gradient norm before clipping, still on the device."""
    with autocast(device, precision):
        losses = model(batch, objectives)
        loss = torch.stack([objective.weight * losses[objective.name] for objective in objectives]).sum()
    loss.backward()
    return loss.detach(), optimizer.step()


class StepLog:
    """One JSON line a step. Losses stay on the device until `flush`, so that logging makes no step wait."""

    def __init__(self, path: Path, flush_every: int = 50):
        self._file = path.open("w", encoding="utf-8")
        self._waiting: list[tuple[dict, Tensor, Tensor]] = []
        self._flush_every = flush_every
        self.loss = math.nan

    def add(self, facts: dict, loss: Tensor, grad_norm: Tensor) -> None:
        self._waiting.append((facts, loss, grad_norm))
        if len(self._waiting) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Writes what waits; FastidcError at the first loss that is not finite."""
        bad = self._write()
        if bad is not None:
            raise FastidcError(
                f"the loss or its gradient is not finite at step {bad}; check the weights that it started from, or lower the learning rate."
            )

    def _write(self) -> int | None:
        """Writes what waits; returns the first step that is not finite."""
        if not self._waiting:
            return None
        values = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in self._waiting]).tolist()
        bad = None
        for (facts, _, _), (loss, norm) in zip(self._waiting, values, strict=True):
            finite = math.isfinite(loss) and math.isfinite(norm)
            bad = bad or (None if finite else facts["step"])
            row = {**facts, "loss": loss if math.isfinite(loss) else None, "grad_norm": norm if math.isfinite(norm) else None}
            self._file.write(json.dumps(row) + "\n")
            self.loss = loss
        self._file.flush()
        self._waiting.clear()
        return bad

    def close(self) -> None:
        """Also after an interrupt: every step that ran is in the file."""
        self._write()
        self._file.close()


def fit(
    model,
    loader: PairLoader,
    objectives: Sequence[Objective],
    optimizer: Optimizer,
    *,
    total_steps: int,
    device: torch.device,
    precision: str,
    log: StepLog,
    bar,
    after_epoch: Callable[[int], None],
) -> None:
    """Trains for ``total_steps``; ``after_epoch(epoch)`` follows every epoch that trained, the last one even if it was cut short."""
    step, epoch, started = 0, 0, time.perf_counter()
    while step < total_steps:
        model.train()
        for batch in loader.epoch(epoch):
            lrs = optimizer.lrs
            pairs = batch.images.shape[0] * (batch.images.shape[1] - 1)
            loss, norm = training_step(model, batch.to(device), objectives, optimizer, device, precision)
            step += 1
            log.add({"step": step, "epoch": epoch, "lr": lrs, "seconds": round(time.perf_counter() - started, 3)}, loss, norm)
            bar.update(pairs)
            if device.type == "cpu" or step % 50 == 0:
                bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            if step == total_steps:
                break
        log.flush()
        after_epoch(epoch)
        epoch += 1
