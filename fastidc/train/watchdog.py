"""Says where a process stands when it stands still."""

import sys
import threading
import time
from collections.abc import Callable

from fastidc.train.distributed import World


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


class Watchdog:
    """A thread that speaks when one phase ("reading", "training", "scoring", "saving") lasts longer than ``limit`` seconds, and again each time its
    length has doubled. Every process has its own. It only tells; a context manager. limit None: it does nothing."""

    def __init__(self, limit: float | None, world: World, say: Callable[[str], None] = _to_stderr):
        self._limit, self._world, self._say = limit, world, say
        self._at = (0, "starting", time.monotonic())
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def now(self, phase: str, step: int) -> None:
        """``step``: the one that is being made, or after which something else is done."""
        self._at = (step, phase, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self._limit is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        told, limit = self._at, self._limit
        while not self._end.wait(min(1.0, self._limit / 4)):
            at = self._at
            if at is not told:
                told, limit = at, self._limit
            step, phase, since = at
            if (seconds := time.monotonic() - since) >= limit:
                limit = 2 * seconds
                self._say(
                    f"watchdog: process {self._world.rank} of {self._world.size} has been {phase} at step {step} for {seconds:.0f} s."
                )
