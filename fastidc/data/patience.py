"""How long one image may take: a disk that hangs, or a file that is made to take for ever, ends a run with a sentence and not in silence."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fastidc.data.limits import shown
from fastidc.errors import FastidcError

PATIENCE = 60.0
"""Seconds that reading and decoding one image may take. The largest that is decoded at all takes about five."""
_LOOK = 1.0  # seconds between two looks at what is being read
_being_read: dict[int, tuple[float, str | Path]] = {}  # thread -> since when, and which image
S, T = TypeVar("S"), TypeVar("T")


class SlowImageError(FastidcError):
    """An image has taken longer than `PATIENCE`. The thread that reads it cannot be ended, and nobody waits for it."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around everything that a thread does with the image at ``path``."""
    thread = threading.get_ident()
    _being_read[thread] = time.monotonic(), path
    try:
        yield
    finally:
        _being_read.pop(thread, None)


def result(future: "Future[T]") -> T:
    """``future.result()``; SlowImageError where any image of this process takes too long meanwhile.

    Looks are counted, not hours: a process that was stopped and goes on, or a machine that slept, has not been waiting.
    """
    looks = 0
    while not future.done():
        wait([future], _LOOK)
        looks += 1
        if looks * _LOOK >= PATIENCE and (slow := _slow()) is not None:
            raise SlowImageError(
                f"{shown(slow)}: is not read after {PATIENCE:g} s; the disk is slow or hangs, or the file is made to take long: see to the disk, or "
                "replace the file."
            )
    return future.result()


def under_way(pool: Executor, work: Callable[[S], T], items: Iterable[S], most: int) -> Iterator[T]:
    """``pool.map`` that holds at most ``most`` of the items' futures, and waits as `result` does."""
    items = iter(items)
    waiting = deque(pool.submit(work, item) for item in islice(items, most))
    while waiting:
        done = result(waiting.popleft())
        waiting.extend(pool.submit(work, item) for item in islice(items, 1))
        yield done


def _slow() -> str | Path | None:
    now = time.monotonic()
    return next((path for since, path in list(_being_read.values()) if now - since > PATIENCE), None)


class Pool(Executor):
    """Threads that read images. Left with a SlowImageError, and at the end of the process, nobody waits for them: one of them may never come back."""

    def __init__(self, workers: int):
        self._tasks: queue.SimpleQueue[tuple[Future, Callable, tuple, dict] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"images-{i}", daemon=True) for i in range(max(1, workers))]
        self._open = True
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        if not self._open:
            raise RuntimeError("this pool is shut down")
        future: Future[T] = Future()
        self._tasks.put((future, function, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._open = False
        if cancel_futures:
            while not self._tasks.empty():
                if (task := self._tasks.get()) is not None:
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        slow = kind is not None and issubclass(kind, SlowImageError)
        self.shutdown(wait=not slow, cancel_futures=slow)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, args, kwargs = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # it is the waiter's
                future.set_exception(error)
            del task, future, function, args, kwargs  # a result is not kept until the next one
