"""METEOR of sets of captions and of their subsets through one process, or the reason why there is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from fastidc.evaluate.intervals import meteor_of, meteor_statistics
from fastidc.evaluate.java import JavaError, Meteor

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
        self._shared = _shared
        self._lock = threading.Lock() if _shared is None else _shared.lock

    def start(self) -> None:
        """Starts the process where there is none and nothing speaks against it; its loading goes on beside the caller's work."""
        if self.process is None and self.reason is None:
            try:
                if self._shared is None:
                    self.process = Meteor()
                    return
                with self._lock:
                    self.process = self._shared.process = self._shared.process or Meteor()
            except JavaError as error:
                self._give_up(error)

    def close(self) -> None:
        """Ends the process, unless it is others' too; `start` would start another one."""
        process, self.process = self.process, None
        if process is not None and self._shared is None:
            process.close()

    def ask(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> Answer | None:
        """Statistics of tokenised captions [N] with references [N][R]; None with a reason where there is no METEOR.

        The jar aligns a caption with each reference by itself and keeps the best. Distractors have few sentences between them, so most of
        those alignments are the same ones: each is asked for once, and the best is chosen here, as far as the jar agrees.
        """
        with self._lock:
            if self.process is None:
                return None
            try:
                sample = self.process.segments(references[:_SAMPLE], captions[:_SAMPLE])
                answer = self._aligned(references, captions)
                if answer is None or answer.lines[:_SAMPLE] != sample:
                    lines = self.process.segments(references, captions, self._progress)
                    answer = Answer(lines, meteor_statistics(lines), 0.0)
                return replace(answer, sample=self.process.corpus(sample)[0])
            except JavaError as error:
                self._give_up(error)
                return None

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
        with self._lock:
            if self.process is None:
                return None
            try:
                found = {name: self.process.corpus([answer.lines[number] for number in some])[0] for name, some in chosen.items()}
                return MeteorScores(found, self.process.corpus(answer.lines)[1], None)
            except JavaError as error:
                self._give_up(error)
                return None

    def abort(self) -> None:
        """Ends the process whoever shares it, and with it the wait of a thread that has asked."""
        if self._shared is not None and self._shared.process is self.process:
            self._shared.process = None  # for whoever comes next another one
        process, self.process = self.process, None
        if process is not None:
            process.close()

    def _give_up(self, error: JavaError) -> None:
        self.reason = str(error)
        self.abort()
