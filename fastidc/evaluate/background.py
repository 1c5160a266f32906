"""Scoring beside other work: captions are handed over, scores come later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from fastidc.evaluate.captions import CaptionScorer


class BackgroundScorer:
    """Scores caption sets one after another in a thread of its own, by one `CaptionScorer` and so one METEOR process.

    ``options``: `CaptionScorer`'s. METEOR starts with the first set. The thread's own work, without Java, is a second for 8,000 pairs.
    A context manager: leaving it waits for what was submitted, or cancels it where an error is under way, and ends METEOR.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], **options: bool | str) -> None:
        self._scorer = CaptionScorer(references, **options)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="caption scores")

    def submit(self, hypotheses: Mapping[str, str], types: Mapping[str, str] | None = None) -> Future[dict]:
        """Returns at once; the future's result is `score_by_subset`'s, or raises what it raises. ``hypotheses`` may change afterwards."""
        return self._pool.submit(self._scorer.by_subset, dict(hypotheses), types)

    def __enter__(self) -> BackgroundScorer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(cancel=kind is not None)

    def close(self, cancel: bool = False) -> None:
        """Waits for the sets that were submitted (``cancel``: for the one at work alone) and ends METEOR. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=cancel)
        self._scorer.close()
