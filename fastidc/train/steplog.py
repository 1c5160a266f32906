"""What a run writes of every step: log.jsonl, with what is wrong about its numbers."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastidc import ops
from fastidc.errors import FastidcError, NotFiniteError
from fastidc.train.distributed import ALONE, World
from fastidc.train.rows import Rows
from fastidc.train.scalars import Scalars

MOST_SKIPPED = 40  # in a row: the scaler has gone from 2^16 to 2^-24, and it was not the scale
SPIKE = 8.0  # deviations


class Spikes:
    """Losses that stand far above those before them. It only tells.

    The measure is that of log(loss): its distance from the median of the last hundred in units of 1.4826 times their median absolute deviation,
    which is a standard deviation where they are normal, and which a few spikes do not move.
    """

    LEAST = 20  # losses before anything is said
    FLOOR = 0.01  # of the deviation: a loss that hardly moves would make a spike of 2 %

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=100)

    def see(self, loss: float) -> float | None:
        """The next loss; its deviations where it is a spike."""
        if not (math.isfinite(loss) and loss > 0):
            return None
        log, found = math.log(loss), None
        if len(self._logs) >= self.LEAST:
            middle = statistics.median(self._logs)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in self._logs)
            score = (log - middle) / max(deviation, self.FLOOR)
            found = round(score, 2) if score > SPIKE else None
        self._logs.append(log)
        return found


class StepLog:
    """One JSON line a step. Losses stay on the device until `flush`, so that logging makes no step wait.

    With several processes the losses are their mean and the first process writes; all call `add` and `flush` alike. The line of a step whose
    update was left out, because its gradient is not finite, has ``skipped``: how many there were up to it. That of a spike has ``spike``.
    """

    def __init__(
        self,
        path: Path,
        world: World = ALONE,
        *,
        flush_every: int = 50,
        keep: int = 0,
        scalars: Scalars | None = None,
        most: int = 1,
        spikes: bool = False,
        counts: tuple[int, int] = (0, 0),
    ):
        """keep: steps of an earlier run that stay, where this one goes on after them; counts: what its `counts` were then. most: so many steps in
        a row that are not finite are an error. spikes: look for them."""
        self._rows: Rows | None = None
        world.on_main(lambda: self._open(path, keep))
        self.left_out, self.in_a_row = counts
        self.not_finite = 0  # steps written by this log that were not
        self.harmed = False  # whether the last step may have brought to the weights what is no number
        self._waiting: list[tuple[dict, Tensor, Tensor]] = []
        self._world, self._flush_every, self._scalars, self._most = world, flush_every, scalars, most
        self._spikes = Spikes() if spikes else None
        self.spikes: list[tuple[int, float]] = []
        self._remember(world.broadcast([] if self._rows is None else list(self._rows.last)))
        self.loss = math.nan

    @property
    def counts(self) -> tuple[int, int]:
        """Updates left out so far, and how many steps in a row, up to the last one, were not finite. As of the last `flush`."""
        return self.left_out, self.in_a_row

    def _open(self, path: Path, keep: int) -> None:
        self._rows = Rows(path, keep)

    def _remember(self, rows: Iterable[dict]) -> None:
        for row in rows if self._spikes is not None else ():
            if isinstance(row.get("loss"), float):
                self._spikes.see(row["loss"])

    def add(self, facts: dict, loss: Tensor, grad_norm: Tensor) -> None:
        self._waiting.append((facts, loss, grad_norm))
        if len(self._waiting) >= self._flush_every:
            self.flush()

    def flush(self, to_disk: bool = False) -> None:
        """Writes what waits; FastidcError where an op met what it could not read, a NotFiniteError where too many losses in a row are not finite."""
        before = self.not_finite
        bad = self._write(together=True)
        said = self._faults()
        if bad is None and self.not_finite > before:  # which embedding it was explains a step that is counted, and is no fault besides
            said = [sentence for sentence in said if "embedding that is not finite" not in sentence]
        if bad is not None:
            said.insert(
                0,
                f"the loss or its gradient is not finite at step {bad}; check the weights that it started from, or lower the learning rate.",
            )
        if said:
            raise (FastidcError if bad is None else NotFiniteError)(" ".join(said))
        if to_disk and self._rows is not None:
            self._rows.flush(to_disk=True)

    def _faults(self) -> list[str]:
        """What any process's kernels found wrong, each sentence once, on all of them, so that none goes on alone."""
        found: dict[str, int] = {}
        for rank, sentences in enumerate(self._world.gather_everywhere(ops.take_faults())):
            for sentence in sentences:
                found.setdefault(sentence, rank)
        return [sentence if self._world.size == 1 else f"Process {rank}: {sentence}" for sentence, rank in found.items()]

    def _write(self, together: bool) -> int | None:
        """Writes what waits; returns the first step that is not finite and one too many."""
        if not self._waiting:
            return None
        losses = torch.stack([loss.float() for _, loss, _ in self._waiting])
        norms = torch.stack([norm.float() for _, _, norm in self._waiting])
        losses = self._world.mean(losses) if together else losses
        bad = None
        for (facts, _, _), loss, norm in zip(self._waiting, losses.tolist(), norms.tolist(), strict=True):
            finite = math.isfinite(loss) and math.isfinite(norm)
            # the scaler's way: it left the step out, and halves its factor; but not for ever
            scaled = math.isfinite(loss) and not finite and facts.get("scaled", False)
            self.in_a_row = 0 if finite else self.in_a_row + 1
            self.not_finite += not finite
            self.harmed = not finite and not scaled
            if not finite and self.in_a_row >= (MOST_SKIPPED if scaled else self._most):
                bad = bad or facts["step"]
            row = {**facts, "loss": loss if math.isfinite(loss) else None, "grad_norm": norm if math.isfinite(norm) else None}
            if not math.isfinite(norm):
                self.left_out += 1
                row["skipped"] = self.left_out
            if self._spikes is not None and (spike := self._spikes.see(loss)) is not None:
                row["spike"] = spike
                self.spikes.append((facts["step"], spike))
            if self._rows is not None:
                self._rows.add(row)
            if self._scalars is not None and finite:
                self._scalars.add({"loss": loss, "grad_norm": norm, "lr": max(facts["lr"])}, facts["step"], "train")
            self.loss = loss
        if self._rows is not None:
            self._rows.flush()
        self._waiting.clear()
        return bad

    def close(self) -> None:
        """Also after an interrupt: every step that ran is in the file."""
        self._write(together=False)
        if self._rows is not None:
            self._rows.close()
