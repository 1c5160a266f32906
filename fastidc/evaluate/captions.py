"""BLEU, METEOR, ROUGE-L and CIDEr of change captions, overall and by kind of pair, with pycocoevalcap's values.

Raw values, not times 100. CIDEr is what the papers call so: the CIDEr-D formula (clipped counts, sigma 6, times 10) with the inverse
document frequencies of the references that are scored (``data_evaluation.md`` 3.2), so the subsets do not average to the whole and one
pair alone scores 0. The protocol is the official one (``clip4idc.md`` 7.2); its faults are not (``data_evaluation.md`` 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from fastidc.errors import FastidcError
from fastidc.evaluate.blocks import METRICS, Examined, add_intervals, each_caption, nested, score_blocks, subsets_of
from fastidc.evaluate.changes import (
    CHANGE_TYPES,
    change_accuracy,
    is_no_change_id,
    object_colour,
    object_colour_accuracy,
    parse_change,
    type_accuracy,
    type_confusion,
)
from fastidc.evaluate.constant import constant_cider, frequent_captions
from fastidc.evaluate.intervals import RESAMPLES
from fastidc.evaluate.meteor import Answer, MeteorDesk
from fastidc.evaluate.ngrams import Ngrams
from fastidc.evaluate.ptb import TOKENIZERS, tokenize

__all__ = [
    "CHANGE_TYPES",
    "METRICS",
    "CaptionScorer",
    "Examined",
    "best_constant_caption",
    "change_accuracy",
    "is_no_change_id",
    "object_colour",
    "object_colour_accuracy",
    "parse_change",
    "score_by_subset",
    "score_captions",
    "type_accuracy",
    "type_confusion",
]


_Job = tuple[Mapping[str, str], Mapping[str, list[str]], int, int]  # tokenised captions, subsets, resamples and seed of their intervals


class CaptionScorer:
    """Scores any number of caption sets against one set of references.

    ``references``: id -> sentences. They are tokenised once, as far as an id is scored, and one METEOR process serves every call (its
    start goes on beside the tokenising). ``meteor=False`` leaves METEOR out. ``tokenizer``: "auto", "ptb-java" or
    "ptb-regex". An empty reference is dropped where its pair has another one: pycocoevalcap gives an empty caption ROUGE-L 1.0 for it,
    and Spot-the-Diff ships 7 of them; ``keep_empty_references=True`` is the official behaviour. ``progress``: a bar for METEOR, which takes
    longest. Not for two threads at a time.

    A context manager: ``close`` ends the METEOR process.
    Raises FastidcError for references that are no sentences and for an unknown tokeniser.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        *,
        meteor: bool = True,
        tokenizer: str = "auto",
        keep_empty_references: bool = False,
        progress: bool = False,
    ) -> None:
        for pair, sentences in references.items():
            if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in sentences):
                raise FastidcError(f"references of {pair!r} are not a list of sentences; give a list of strings")
            if not sentences:
                raise FastidcError(f"references of {pair!r} are empty; give at least one sentence or leave the pair out")
        if tokenizer not in TOKENIZERS:
            raise FastidcError(f"tokenizer {tokenizer!r} is not one of {', '.join(TOKENIZERS)}")
        self._references = references
        self._keep_empty = keep_empty_references
        self._asked_tokenizer = tokenizer
        self._tokenizer_reason: str | None = None
        self._used_tokenizer = tokenizer
        self._tokenized: dict[str, list[str]] = {}
        self._written: dict[str, str] = {}  # tokens -> a sentence as it was given
        self._meteor = MeteorDesk(meteor, progress)

    def __enter__(self) -> CaptionScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the METEOR process; the next call would start another one."""
        self._meteor.close()

    def score(self, hypotheses: Mapping[str, str]) -> dict[str, float | int | str | None]:
        """Scores of one set of captions; see `score_captions`."""
        return self._score(hypotheses, {"overall": list(hypotheses)})["overall"]

    def by_subset(self, hypotheses: Mapping[str, str], types: Mapping[str, str] | None = None) -> dict:
        """Scores of one set of captions by kind of pair; see `score_by_subset`."""
        return self._score(hypotheses, subsets_of(list(hypotheses), types))

    def examine(
        self,
        hypotheses: Mapping[str, str],
        types: Mapping[str, str] | None = None,
        overlaps: Mapping[str, float] | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
        constant: bool = False,
    ) -> Examined:
        """`by_subset` with 95 % intervals (`fastidc.evaluate.intervals`; ``resamples=0``: none) and the scores of every caption.

        ``overlaps``: id of a change pair -> IoU, scored by bins under "iou". ``constant``: `best_constant` of these pairs as well, looked for
        while METEOR is at work.
        """
        with self._ended_by_errors():
            pairs, found = list(hypotheses), ""
            captions = self._tokenized_captions(hypotheses)

            def jobs() -> Iterator[_Job]:
                nonlocal found
                yield captions, subsets_of(pairs, types, overlaps), resamples, seed
                if constant:
                    found, tokens = self._constant(pairs)
                    yield dict.fromkeys(pairs, tokens), subsets_of(pairs, types), 0, 0

            examined, *others = self._examined(jobs())
        return replace(examined, constant=(found, others[0].scores)) if others else examined

    def best_constant(
        self, pairs: Iterable[str] | None = None, candidates: Sequence[str] | None = None, types: Mapping[str, str] | None = None
    ) -> tuple[str, dict]:
        """The one caption that scores best on every pair (``pairs``: all by default); see `best_constant_caption`."""
        pairs = list(self._references if pairs is None else pairs)
        self._check(dict.fromkeys(pairs, ""))
        with self._ended_by_errors():
            self._meteor.start(itertools.chain.from_iterable(self._references[pair] for pair in pairs))
            caption, tokens = self._constant(pairs, candidates)
            (examined,) = self._examined([(dict.fromkeys(pairs, tokens), subsets_of(pairs, types), 0, 0)])
        return caption, examined.scores

    def _constant(self, pairs: Sequence[str], candidates: Sequence[str] | None = None) -> tuple[str, str]:
        """The caption of `best_constant`, as it is written and its tokens."""
        tokenized = self._tokenized_references(pairs)
        if candidates is None:
            captions = {tokens: self._written[tokens] for tokens in frequent_captions(pairs, tokenized, is_no_change_id)}
        else:
            captions = dict(zip(reversed(self._tokens(list(candidates))), reversed(candidates), strict=True))  # of equals, the first
            captions = dict(reversed(captions.items()))
        if not captions:
            raise FastidcError("there is no candidate for a constant caption: give at least one sentence")
        tokenized = self._tokenized_references(pairs)  # once more, where Java failed at the candidates
        scores = constant_cider([tokenized[pair] for pair in pairs], list(captions))
        best = list(captions)[int(scores.argmax())]
        return captions[best], best

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._meteor.abort()
            raise

    def _check(self, hypotheses: Mapping[str, str]) -> None:
        if not hypotheses:
            raise FastidcError("there are no captions to score; give at least one")
        for pair, caption in hypotheses.items():
            if pair not in self._references:
                raise FastidcError(f"caption of {pair!r} has no references; leave it out, or score it against the file that names it")
            if not isinstance(caption, str):
                raise FastidcError(f"caption of {pair!r} is {type(caption).__name__} and not text; give one sentence for each pair")

    def _tokens(self, sentences: Sequence[str]) -> list[str]:
        tokens, used, reason = tokenize(sentences, self._asked_tokenizer)
        if reason is not None:  # stay with the fall-back: one table must not mix two tokenisers
            self._asked_tokenizer, self._tokenizer_reason = used, reason
            self._tokenized.clear()
        self._used_tokenizer = used
        return tokens

    def _tokenized_references(self, pairs: Sequence[str]) -> dict[str, list[str]]:
        # More than one turn only where Java fails at the second call of two: what it had tokenised is done again.
        while missing := [pair for pair in pairs if pair not in self._tokenized]:
            written = [sentence for pair in missing for sentence in self._references[pair]]
            lines = self._tokens(written)
            self._written |= zip(reversed(lines), reversed(written), strict=True)
            rest = iter(lines)
            for pair in missing:
                sentences = [next(rest) for _ in self._references[pair]]
                kept = sentences if self._keep_empty else [sentence for sentence in sentences if sentence]
                self._tokenized[pair] = kept or sentences
        return self._tokenized

    def _score(self, hypotheses: Mapping[str, str], subsets: Mapping[str, list[str]]) -> dict:
        with self._ended_by_errors():
            (examined,) = self._examined([(self._tokenized_captions(hypotheses), subsets, 0, 0)])
        return examined.scores

    def _tokenized_captions(self, hypotheses: Mapping[str, str]) -> dict[str, str]:
        """Tokens of ``hypotheses``, and of their references by the same tokeniser; METEOR's start goes on beside it."""
        self._check(hypotheses)
        self._meteor.start([*itertools.chain.from_iterable(self._references[pair] for pair in hypotheses), *hypotheses.values()])
        while True:  # once more, where Java failed between the two: one table must not mix two tokenisers
            self._tokenized_references(list(hypotheses))
            before = self._tokenizer_reason
            captions = dict(zip(hypotheses, self._tokens(list(hypotheses.values())), strict=True))
            if self._tokenizer_reason == before:
                return captions

    def _examined(self, jobs: Iterable[_Job]) -> list[Examined]:
        """What each set is told; a job may be made while METEOR is at work on the one before."""
        with ThreadPoolExecutor(1) as pool:
            try:
                asked = [(job, pool.submit(self._asked, job[0])) for job in jobs]
                return [self._examine(*job, answer) for job, answer in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._meteor.abort()  # ends the thread's wait
                raise

    def _asked(self, captions: Mapping[str, str]) -> Answer | None:
        return self._meteor.ask([self._tokenized[pair] for pair in captions], list(captions.values()))

    def _examine(
        self, captions: Mapping[str, str], subsets: Mapping[str, list[str]], resamples: int, seed: int, answer: Future[Answer | None]
    ) -> Examined:
        import numpy as np

        pairs, references = list(captions), self._tokenized
        place = {pair: number for number, pair in enumerate(pairs)}
        chosen = {name: np.array([place[pair] for pair in some]) for name, some in subsets.items()}
        ngrams = Ngrams([references[pair] for pair in pairs], list(captions.values()))
        blocks, ciders = score_blocks(ngrams, chosen)
        asked = answer.result()
        meteor = None if asked is None else self._meteor.scores(asked, chosen)
        for name, block in blocks.items():
            block["tokenizer"] = self._used_tokenizer
            if meteor is not None:
                block["METEOR"] = meteor.scores[name]
            else:
                block["METEOR_reason"] = self._meteor.reason
            if self._tokenizer_reason is not None:
                block["tokenizer_reason"] = self._tokenizer_reason
        if resamples:
            add_intervals(blocks, chosen, ngrams, ciders, meteor and meteor.statistics, resamples, seed)
        return Examined(
            nested(blocks),
            each_caption(pairs, ngrams, ciders["overall"], meteor and meteor.each),
            [pair for pair in pairs if not all(text.strip() for text in references[pair])],
            [pair for pair in pairs if not captions[pair].strip()],
        )


def score_captions(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    meteor: bool = True,
    tokenizer: str = "auto",
    keep_empty_references: bool = False,
) -> dict[str, float | int | str | None]:
    """BLEU-1..4, METEOR, ROUGE-L and CIDEr of one caption per pair, over the ids of ``hypotheses``.

    Returns `METRICS` -> raw value, ``pairs`` and ``tokenizer`` ("ptb-java" | "ptb-regex"). METEOR is None where Java is missing or its
    jar fails, and ``METEOR_reason`` says why; ``tokenizer_reason`` says why the jar did not tokenise. Empty references are dropped
    (see `CaptionScorer`) unless ``keep_empty_references``.
    Raises FastidcError that names the id where a caption has no references or is no text, and where there is nothing to score.
    """
    with CaptionScorer(references, meteor=meteor, tokenizer=tokenizer, keep_empty_references=keep_empty_references) as scorer:
        return scorer.score(hypotheses)


def score_by_subset(
    references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], types: Mapping[str, str] | None = None, **options: bool | str
) -> dict:
    """Scores overall, on change pairs, on no-change pairs and on each type: ``{"overall": {...}, "change", "no_change", "types": {...}}``.

    Each value is what `score_captions` returns, which also lists the ``options``. ``types``: id of a change pair -> its type. A type is
    scored on the change pairs that have it, with the inverse document frequencies of that subset (the RCC protocol, ``clip4idc.md``
    7.2). Subsets without a pair are left out; so are ``change`` and ``no_change`` for data with neither types nor no-change ids
    (Spot-the-Diff), where they would only repeat ``overall``.
    """
    with CaptionScorer(references, **options) as scorer:
        return scorer.by_subset(hypotheses, types)


def best_constant_caption(
    references: Mapping[str, Sequence[str]],
    candidates: Sequence[str] | None = None,
    *,
    types: Mapping[str, str] | None = None,
    **options: bool | str,
) -> tuple[str, dict]:
    """The caption that, given to every pair, has the highest CIDEr: ``(caption, its scores as score_by_subset gives them)``.

    A model that scores no higher has learned the prior of the data and nothing of the images. ``candidates``: the most frequent 500
    distinct references and the most frequent 50 of the no-change pairs, unless given. The caption is chosen by its CIDEr, for which references are
    counted once for all candidates. Equal candidates: the first one.
    """
    with CaptionScorer(references, **options) as scorer:
        return scorer.best_constant(candidates=candidates, types=types)
