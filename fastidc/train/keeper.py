"""When a run is saved, and what happens where that fails."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastidc.config import TrainOptions
from fastidc.errors import FastidcError
from fastidc.train import snapshot
from fastidc.train.agreement import Agreement
from fastidc.train.distributed import World
from fastidc.train.signals import Signals


class Keeper:
    """Snapshots of a run in ``folder``, written beside it, and the signals that end it. Every process calls every method alike; the first one
    writes, and its clock decides."""

    def __init__(self, folder: Path, options: TrainOptions, world: World, signals: Signals, say: Callable[[str], None]):
        self.folder, self.options, self.world, self.signals, self._say = folder, options, world, signals, say
        self._writer = snapshot.Writer(folder, options.keep)
        self._agreement = Agreement(world, self._noticed)
        self._saved_step = 0  # or where the run began
        self._begun: int | None = None  # the step of the last snapshot of this run
        self._saved_at = time.monotonic()
        self.stopping = 0  # the signal at which all processes end

    def _noticed(self) -> tuple[int, int, int]:
        minutes = self.options.save_every_minutes
        late = self.world.is_main and minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        return self.signals.number, int(late), int(self._writer.failed)

    @property
    def saves(self) -> bool:
        """Whether anything is saved unasked."""
        return self.options.save_every_minutes > 0 or self.options.save_every_steps is not None

    def start_counting(self, step: int) -> None:
        """``step`` is where the run stands, and needs no snapshot of its own."""
        self._saved_step = step

    def look(self, step: int, now: bool = False) -> bool:
        """After a step: whether to save. Sets `stopping`; FastidcError on all processes where the snapshot before could not be written. now: as of
        this moment, which makes processes wait for each other."""
        number, late, failed = self._agreement.now() if now else self._agreement.read()
        self.stopping = self.stopping or number
        if failed:
            self._wait()
        every = self.options.save_every_steps
        return bool(late) or (every is not None and step - self._saved_step >= every)

    def tell(self) -> None:
        """After what `look` asked for was done."""
        self._agreement.tell()

    def has(self, step: int) -> bool:
        """Whether the last snapshot is of this step."""
        return self._begun == step

    def save(self, step: int, tensors: snapshot.Tensors, state: Mapping[str, Any], best: Path | None) -> None:
        """Hands a snapshot to the writer; ``best``: the file of the best epoch's weights, if there is one."""
        self._saved_step = self._begun = step
        self._saved_at = time.monotonic()
        self._guarded(lambda: self._writer.start(step, tensors, state, None if best is None else snapshot.beside(self.folder, best)))

    def _guarded(self, run: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                run()
            except OSError as error:
                raise FastidcError(
                    f"{self.folder} cannot be written ({error.strerror or error}); make room, or give another --out."
                ) from None

        def kept() -> None:
            try:
                attempt()
            except FastidcError as error:
                if self.options.on_save_error == "stop":
                    raise
                self._say(f"{error} Training goes on (--on-save-error continue).")

        self.world.on_main(kept)

    def _wait(self) -> None:
        self._guarded(self._writer.wait)

    def finish(self) -> Path | None:
        """Until what was begun is on the disk; the newest snapshot there, on all processes."""
        self._wait()
        return self.world.on_main(lambda: next(iter(snapshot.found(self.folder)), None))

    def close(self) -> None:
        """Lets a snapshot that is being written come to its end; says where it could not."""
        try:
            self._writer.wait()
        except FastidcError as error:
            self._say(str(error))
