"""Which samples every step has learnt from, so that it can be proven that an epoch has each once, however often a run was interrupted.

RUN/ledger.jsonl has a line a step, {"step": 7, "epoch": 0, "ids": [...]}, of what was read, not of what was planned. It only grows; a run that goes
on from an earlier step takes away the lines of the steps that are made again.
"""

from collections.abc import Iterable
from pathlib import Path

from fastidc.errors import FastidcError
from fastidc.files import parse_json
from fastidc.train.distributed import World
from fastidc.train.rows import Rows

LEDGER_FILE = "ledger.jsonl"


class Ledger:
    """Writes the ledger. Every process calls every method alike; the first one writes what all of them have read, rank after rank."""

    def __init__(self, path: Path, world: World, keep: int = 0, flush_every: int = 50):
        self._world, self._flush_every, self._rows = world, flush_every, None
        self._waiting: list[tuple[int, int, list[str]]] = []
        world.on_main(lambda: self._open(path, keep))

    def _open(self, path: Path, keep: int) -> None:
        self._rows = Rows(path, keep)

    def add(self, step: int, epoch: int, ids: list[str]) -> None:
        self._waiting.append((step, epoch, ids))
        if len(self._waiting) >= self._flush_every:
            self.flush()

    def flush(self, to_disk: bool = False) -> None:
        """Gathers what waits from all processes and writes it."""
        if self._waiting:
            self._write(self._world.gather_everywhere([ids for _, _, ids in self._waiting]))
        if to_disk and self._rows is not None:
            self._rows.flush(to_disk=True)

    def _write(self, parts: list[list[list[str]]]) -> None:
        for i, (step, epoch, _) in enumerate(self._waiting):
            if self._rows is not None:
                self._rows.add({"step": step, "epoch": epoch, "ids": [name for part in parts for name in part[i]]})
        if self._rows is not None:
            self._rows.flush()
        self._waiting.clear()

    def close(self) -> None:
        """Also after an interrupt. One process writes what waits; of several, which may no longer be there, nobody knows the others' part."""
        if self._world.size == 1:
            self.flush()
        if self._rows is not None:
            self._rows.close()


def check_ledger(path: Path, batch_size: int, steps_per_epoch: int, samples: Iterable[str] | None = None) -> dict[str, int]:
    """Proves a ledger: steps follow each other from 1, each has ``batch_size`` samples, an epoch has ``steps_per_epoch`` steps (the last may have
    fewer) and no sample twice. samples: ids that there are. Returns the numbers of steps, of epochs and of samples read; FastidcError names the
    line that does not fit."""
    known = None if samples is None else set(samples)
    steps, epochs, read, seen, made = 0, 0, 0, {}, 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                step, epoch, ids = row["step"], row["epoch"], row["ids"]
            except (ValueError, KeyError, TypeError):
                raise FastidcError(f"{path}: line {number} is no step of a ledger; it is damaged.") from None

            def wrong(what: str, number: int = number) -> FastidcError:
                return FastidcError(f"{path}: line {number}: {what}.")

            if step != steps + 1:
                raise wrong(f"step {step} follows step {steps}")
            if epoch not in (epochs - 1, epochs):
                raise wrong(f"epoch {epoch} follows epoch {epochs - 1}")
            if epoch == epochs:
                if epochs and made != steps_per_epoch:
                    raise wrong(f"epoch {epoch - 1} ended after {made} of {steps_per_epoch} steps")
                epochs, seen, made = epochs + 1, {}, 0
            if len(ids) != batch_size:
                raise wrong(f"step {step} has {len(ids)} samples instead of {batch_size}")
            for name in ids:
                if known is not None and name not in known:
                    raise wrong(f"sample {name!r} is not in the training split")
                if name in seen:
                    raise wrong(f"sample {name!r} was read in step {seen[name]} already")
                seen[name] = step
            steps, made, read = step, made + 1, read + len(ids)
            if made > steps_per_epoch:
                raise wrong(f"epoch {epoch} has more than {steps_per_epoch} steps")
    return {"steps": steps, "epochs": epochs, "samples": read}
