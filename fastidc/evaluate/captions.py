"""BLEU, METEOR, ROUGE-L and CIDEr of change captions, overall and by kind of pair, through pycocoevalcap.

Raw values, not times 100. CIDEr is what the papers call so: the CIDEr-D formula (clipped counts, sigma 6, times 10) with the inverse
document frequencies of the references that are scored (``data_evaluation.md`` 3.2), so the subsets do not average to the whole and one
pair alone scores 0. The protocol is the official one (``clip4idc.md`` 7.2); its faults are not (``data_evaluation.md`` 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastidc.errors import FastidcError
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
from fastidc.evaluate.java import JavaError, Meteor
from fastidc.evaluate.ptb import TOKENIZERS, tokenize

__all__ = [
    "CHANGE_TYPES",
    "METRICS",
    "CaptionScorer",
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

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


class CaptionScorer:
    """Scores any number of caption sets against one set of references.

    ``references``: id -> sentences. They are tokenised once, as far as an id is scored, and one METEOR process serves every call (its
    start takes 6 s, and goes on beside the tokenising). ``meteor=False`` leaves METEOR out. ``tokenizer``: "auto", "ptb-java" or
    "ptb-regex". An empty reference is dropped where its pair has another one: pycocoevalcap gives an empty caption ROUGE-L 1.0 for it,
    and Spot-the-Diff ships 7 of them; ``keep_empty_references=True`` is the official behaviour. Not for two threads at a time.

    A context manager: ``close`` ends the METEOR process.
    Raises FastidcError for references that are no sentences and for an unknown tokeniser.
    """

    def __init__(
        self, references: Mapping[str, Sequence[str]], *, meteor: bool = True, tokenizer: str = "auto", keep_empty_references: bool = False
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
        self._meteor: Meteor | None = None
        self._meteor_reason = None if meteor else "it was not asked for"

    def __enter__(self) -> CaptionScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the METEOR process; the next call would start another one."""
        if self._meteor is not None:
            self._meteor.close()
            self._meteor = None

    def score(self, hypotheses: Mapping[str, str]) -> dict[str, float | int | str | None]:
        """Scores of one set of captions; see `score_captions`."""
        return self._score(hypotheses, {"overall": list(hypotheses)})["overall"]

    def by_subset(self, hypotheses: Mapping[str, str], types: Mapping[str, str] | None = None) -> dict:
        """Scores of one set of captions by kind of pair; see `score_by_subset`."""
        subsets: dict[str, list[str]] = {"overall": list(hypotheses)}
        no_change = [pair for pair in hypotheses if is_no_change_id(pair)]
        change = [pair for pair in hypotheses if not is_no_change_id(pair)]
        if no_change or types:
            subsets |= {"change": change, "no_change": no_change}
        known = {types[pair] for pair in change if pair in types} if types else set()
        order = [kind for kind in CHANGE_TYPES if kind in known] + sorted(known - set(CHANGE_TYPES))
        for kind in order:
            subsets[f"types/{kind}"] = [pair for pair in change if types.get(pair) == kind]
        scores = self._score(hypotheses, {name: pairs for name, pairs in subsets.items() if pairs})
        result: dict = {name: value for name, value in scores.items() if "/" not in name}
        return result | ({"types": {kind: scores[f"types/{kind}"] for kind in order}} if order else {})

    def best_constant(
        self, pairs: Iterable[str] | None = None, candidates: Sequence[str] | None = None, types: Mapping[str, str] | None = None
    ) -> tuple[str, dict]:
        """The one caption that scores best on every pair (``pairs``: all by default); see `best_constant_caption`."""
        pairs = list(self._references if pairs is None else pairs)
        self._check({pair: "" for pair in pairs})
        tokenized = self._tokenized_references(pairs)
        if candidates is None:
            captions = {tokens: self._written[tokens] for tokens in frequent_captions(pairs, tokenized, is_no_change_id)}
        else:
            captions = dict(zip(reversed(self._tokens(list(candidates))), reversed(candidates), strict=True))  # of equals, the first
            captions = dict(reversed(captions.items()))
        if not captions:
            raise FastidcError("there is no candidate for a constant caption: give at least one sentence")
        scores = constant_cider([tokenized[pair] for pair in pairs], list(captions))
        caption = list(captions.values())[int(scores.argmax())]
        return caption, self.by_subset(dict.fromkeys(pairs, caption), types)

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

    def _score(self, hypotheses: Mapping[str, str], subsets: Mapping[str, list[str]]) -> dict[str, dict]:
        self._check(hypotheses)
        self._start_meteor()
        try:
            self._tokenized_references(list(hypotheses))
            tokens = self._tokens(list(hypotheses.values()))
            references = self._tokenized_references(list(hypotheses))  # again, where Java failed in between
            captions = dict(zip(hypotheses, tokens, strict=True))
            with ThreadPoolExecutor(1) as pool:
                segments = pool.submit(self._meteor_segments, references, captions)
                try:
                    scores = _python_scores(references, captions, subsets)
                except BaseException:
                    self.close()  # ends the thread's wait
                    raise
                statistics = segments.result()
            for name, pairs in subsets.items():
                self._finish(scores[name], [statistics[pair] for pair in pairs] if statistics else None)
            return scores
        except BaseException:
            self.close()
            raise

    def _finish(self, scores: dict, statistics: list[str] | None) -> None:
        if statistics is not None and self._meteor is not None:
            try:
                scores["METEOR"] = self._meteor.corpus(statistics)[0]
            except JavaError as error:
                self._give_up_meteor(error)
        scores["tokenizer"] = self._used_tokenizer
        if scores["METEOR"] is None:
            scores["METEOR_reason"] = self._meteor_reason
        if self._tokenizer_reason is not None:
            scores["tokenizer_reason"] = self._tokenizer_reason

    def _start_meteor(self) -> None:
        if self._meteor is None and self._meteor_reason is None:
            try:
                self._meteor = Meteor()
            except JavaError as error:
                self._give_up_meteor(error)

    def _meteor_segments(self, references: Mapping[str, list[str]], captions: Mapping[str, str]) -> dict[str, str] | None:
        if self._meteor is None:
            return None
        try:
            lines = self._meteor.segments([references[pair] for pair in captions], list(captions.values()))
            return dict(zip(captions, lines, strict=True))
        except JavaError as error:
            self._give_up_meteor(error)
            return None

    def _give_up_meteor(self, error: JavaError) -> None:
        self._meteor_reason = str(error)
        self.close()


def _python_scores(references: Mapping[str, list[str]], captions: Mapping[str, str], subsets: Mapping[str, list[str]]) -> dict[str, dict]:
    """BLEU, ROUGE-L and CIDEr of every subset. pycocoevalcap's n-gram counts of a pair are the same in each, so they are made once."""
    import numpy as np
    from pycocoevalcap.bleu import bleu_scorer
    from pycocoevalcap.cider import cider_scorer
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    pairs = list(captions)
    bleu_references = {pair: bleu_scorer.cook_refs(references[pair]) for pair in pairs}
    bleu_captions = {pair: bleu_scorer.cook_test(captions[pair], bleu_references[pair]) for pair in pairs}
    cider_references = {pair: cider_scorer.cook_refs(references[pair]) for pair in pairs}
    cider_captions = {pair: cider_scorer.cook_test(captions[pair]) for pair in pairs}
    rouges = {pair: rouge.calc_score([captions[pair]], references[pair]) for pair in pairs}
    scores = {}
    for name, chosen in subsets.items():
        bleu = bleu_scorer.BleuScorer(n=4)
        bleu.crefs, bleu.ctest = [bleu_references[pair] for pair in chosen], [bleu_captions[pair] for pair in chosen]
        cider = cider_scorer.CiderScorer()
        cider.crefs, cider.ctest = [cider_references[pair] for pair in chosen], [cider_captions[pair] for pair in chosen]
        values = [*bleu.compute_score(option="closest", verbose=0)[0], None, np.mean([rouges[pair] for pair in chosen])]
        # Without a single word in the references, pycocoevalcap fails instead of giving 0.
        values.append(cider.compute_score()[0] if any(any(sentences) for sentences in cider.crefs) else 0.0)
        scores[name] = {metric: None if value is None else float(value) for metric, value in zip(METRICS, values, strict=True)}
        scores[name]["pairs"] = len(chosen)
    return scores


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
    distinct references and the most frequent 50 of the no-change pairs, unless given. The caption is chosen by our own CIDEr (the same
    formula, references counted once for all candidates), its scores come from pycocoevalcap. Equal candidates: the first one.
    """
    with CaptionScorer(references, **options) as scorer:
        return scorer.best_constant(candidates=candidates, types=types)
