"""Signals that end a run without losing a step: the first one is noted, the step is finished and saved; the second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastidc.errors import FastidcError

PREEMPTED = 75  # EX_TEMPFAIL: run it again
_SAME = 3.0  # seconds in which torchrun may pass on what this process has had already


class AtOnce(BaseException):
    """Raised where a signal arrives inside `Signals.at_once`."""


def check_signal(name: str) -> int:
    """The number of a signal that a run can wait for; FastidcError where there is none of that name."""
    full = name if name.startswith("SIG") else f"SIG{name}"
    number = getattr(signal, full, None)
    if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
        raise FastidcError(f"--preemption-signal is {name!r}; name a signal that can be caught, such as SIGUSR1.")
    return int(number)


class Signals:
    """While it is entered, SIGTERM, SIGINT and the one of ``preemption`` set `number` instead of ending the process.

    Only a program's main thread can do that; in another one nothing is caught. shared: of several processes; torchrun passes on what a terminal
    or Slurm has already sent to all, and that is no second signal.
    """

    def __init__(self, preemption: str | None = None, shared: bool = False):
        self.number = 0  # of the first signal, 0 before it
        self._preemption = 0 if preemption is None else check_signal(preemption)
        self._shared, self._now, self._since = shared, False, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, signal.SIGINT, *([self._preemption] if self._preemption else [])}:
                self._before[int(number)] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if self._shared and time.monotonic() - self._since < _SAME:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number, self._since = number, time.monotonic()
        if os.environ.get("RANK", "0") == "0":  # not print: the main thread may be inside it
            os.write(2, f"\nfastidc: {name_of(number)}: saving after this step; a second one ends at once.\n".encode())
        if self._now:
            raise AtOnce

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises `AtOnce`: for what may be left in the middle."""
        self._now = True
        try:
            if self.number:
                raise AtOnce
            yield
        finally:
            self._now = False

    def code(self, number: int) -> int:
        """The exit code of a run that signal ``number`` ended."""
        return PREEMPTED if number == self._preemption else 128 + number


def name_of(number: int) -> str:
    return signal.Signals(number).name
