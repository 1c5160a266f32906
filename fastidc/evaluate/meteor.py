"""METEOR of sets of captions and of their subsets through one process, or the reason why there is none."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fastidc.evaluate.intervals import meteor_of, meteor_statistics
from fastidc.evaluate.java import JavaError, Meteor
from fastidc.evaluate.paraphrases import StoppedError, words_of

T = TypeVar("T")

_SAMPLE = 100  # captions by which the jar's formula is compared with ours


@dataclass(frozen=True)
class Answer:
    """The jar's statistics of each caption, as lines and, where they are of METEOR 1.5's form, as numbers [N, 23]; and its score of some."""

    lines: list[str]
    statistics: np.ndarray | None
    sample: float


@dataclass(frozen=True)
class MeteorScores:
    """``scores``: subset -> METEOR; ``each``: of every caption; ``statistics`` [N, 23] as `meteor_statistics`, or None."""

    scores: dict[str, float]
    each: list[float]
    statistics: np.ndarray | None


class _Shared:
    """The process of `one_meteor`, which begins with the first desk that wants one."""

    def __init__(self) -> None:
        self.process: Meteor | None = None
        self.lock = threading.Lock()


_shared: _Shared | None = None


@contextmanager
def one_meteor() -> Iterator[None]:
    """Every `MeteorDesk` within the block asks the same process, whose start takes seconds; it ends with the outermost block."""
    global _shared
    if _shared is not None:
        yield
        return
    _shared = _Shared()
    try:
        yield
    finally:
        shared, _shared = _shared, None
        with shared.lock:  # one may be about to start
            if shared.process is not None:
                shared.process.close()


class MeteorDesk:
    """Keeps one METEOR process for any number of sets. ``reason``: why there is no METEOR, else None; once given it stays.

    `ask` may run in another thread than the rest, one call at a time.
    """

    def __init__(self, wanted: bool = True, progress: bool = False) -> None:
        self.reason = None if wanted else "it was not asked for"
        self.process: Meteor | None = None
        self._progress = progress
        self._stop = threading.Event()  # what is under way for this desk is not wanted any more
        self._shared = _shared
        self._lock = threading.Lock() if _shared is None else _shared.lock

    def start(self, sentences: Iterable[str]) -> None:
        """Starts the process for ``sentences``, beside the caller's work, where nothing speaks against it."""
        if self.reason is None:
            words = words_of(sentences)
            self._stop.clear()
            threading.Thread(target=self._locked, args=(lambda: self._begin(words),), name="METEOR's start", daemon=True).start()

    def _begin(self, words: frozenset[str]) -> Meteor:
        """The process, started again where it does not know ``words``."""
        running = self.process if self._shared is None else self._shared.process
        if running is None or not running.knows(words):
            known = frozenset() if running is None else running.words
            if running is not None:
                running.close()
            running = Meteor(words | known, self._stop)
        self.process = running
        if self._shared is not None:
            self._shared.process = running
        elif self._stop.is_set():  # `close` has come before there was anything to end
            self.close()
            raise StoppedError
        return running

    def _locked(self, work: Callable[[], T]) -> T | None:
        """``work()``, alone; None where there is no METEOR, or it fails, or is not wanted any more."""
        with self._lock:
            if self.reason is not None or self._stop.is_set():
                return None
            try:
                return work()
            except JavaError as error:
                self._give_up(error)
            except StoppedError:
                pass
            return None

    def close(self) -> None:
        """Ends the process, unless it is others' too; `start` would start another one."""
        self._stop.set()
        process, self.process = self.process, None
        if process is not None and self._shared is None:
            process.close()

    def ask(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> Answer | None:
        """Statistics of tokenised captions [N] with references [N][R]; None with a reason where there is no METEOR.

        The jar aligns a caption with each reference by itself and keeps the best. Distractors have few sentences between them, so most of
        those alignments are the same ones: each is asked for once, and the best is chosen here, as far as the jar agrees.
        """

        def asked() -> Answer:
            process = self._begin(words_of([*itertools.chain.from_iterable(references), *captions]))
            sample = process.segments(references[:_SAMPLE], captions[:_SAMPLE])
            answer = self._aligned(references, captions)
            if answer is None or answer.lines[:_SAMPLE] != sample:
                lines = process.segments(references, captions, self._progress)
                answer = Answer(lines, meteor_statistics(lines), 0.0)
            return replace(answer, sample=process.corpus(sample)[0])

        return self._locked(asked)

    def _aligned(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> Answer | None:
        """The statistics of each caption's best reference; None where the jar's are not METEOR 1.5's."""
        pairs = [(reference, caption) for several, caption in zip(references, captions, strict=True) for reference in several]
        found = self.process.segments([[reference] for reference, _ in pairs], [caption for _, caption in pairs], self._progress)
        statistics = meteor_statistics(found)
        if statistics is None:
            return None
        ends = np.cumsum([len(several) for several in references])
        best = [begin + int(part.argmax()) for begin, part in zip([0, *ends[:-1]], np.split(meteor_of(statistics), ends[:-1]), strict=True)]
        return Answer([found[row] for row in best], statistics[best], 0.0)

    def scores(self, answer: Answer, chosen: Mapping[str, np.ndarray]) -> MeteorScores | None:
        """Scores of the subsets ``chosen`` (indices) and of every caption; None with a reason where the jar fails.

        Adding statistics up takes the jar seconds for a large set. Its formula is ours too, so the jar scores some captions alone, and
        all of them only where the two differ.
        """
        statistics = answer.statistics
        if statistics is not None and abs(float(meteor_of(statistics[:_SAMPLE].sum(axis=0))) - answer.sample) < 1e-9:
            scores = {name: float(meteor_of(statistics[some].sum(axis=0))) for name, some in chosen.items()}
            return MeteorScores(scores, meteor_of(statistics).tolist(), statistics)

        def scored() -> MeteorScores:
            process = self._begin(frozenset())
            found = {name: process.corpus([answer.lines[number] for number in some])[0] for name, some in chosen.items()}
            return MeteorScores(found, process.corpus(answer.lines)[1], None)

        return self._locked(scored)

    def abort(self) -> None:
        """Ends the process whoever shares it, and with it the wait of a thread that has asked."""
        self._stop.set()
        if self._shared is not None and self._shared.process is self.process:
            self._shared.process = None  # for whoever comes next another one
        process, self.process = self.process, None
        if process is not None:
            process.close()

    def _give_up(self, error: JavaError) -> None:
        self.reason = str(error)
        self.abort()
