"""CIDEr of one caption given to every pair, for many candidate captions at once.

The formula is pycocoevalcap's (``data_evaluation.md`` 3.2). With the same caption everywhere, a reference sentence counts by how often
it occurs and not by whose it is, so each distinct sentence is compared once, and all of them together in array operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_ORDERS = 4
_SIGMA = 6.0


def frequent_captions(
    pairs: Sequence[str],
    tokenized: Mapping[str, Sequence[str]],
    is_no_change: Callable[[str], bool],
    top: int = 500,
    top_no_change: int = 50,
) -> list[str]:
    """Candidates: the tokenised sentences that most pairs have as a reference, most frequent first, ties by letter."""
    everywhere = Counter(sentence for pair in pairs for sentence in dict.fromkeys(tokenized[pair]) if sentence)
    no_change = Counter(sentence for pair in pairs if is_no_change(pair) for sentence in dict.fromkeys(tokenized[pair]) if sentence)
    chosen = [*_most_common(everywhere, top), *_most_common(no_change, top_no_change)]
    return list(dict.fromkeys(chosen))


def _most_common(counts: Counter[str], top: int) -> list[str]:
    return sorted(counts, key=lambda sentence: (-counts[sentence], sentence))[:top]


def constant_cider(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> np.ndarray:
    """Corpus CIDEr [K] of each tokenised candidate [K], given to all pairs with tokenised ``references`` [N][R >= 1]."""
    weights: dict[str, float] = {}  # distinct sentence -> sum over its pairs of its share of the pair's references
    frequency: Counter[tuple[str, ...]] = Counter()
    counts: dict[str, Counter[tuple[str, ...]]] = {}
    for sentences in references:
        for sentence in sentences:
            weights[sentence] = weights.get(sentence, 0.0) + 1 / len(sentences)
            if sentence not in counts:
                counts[sentence] = _ngrams(sentence)
        frequency.update({gram for sentence in sentences for gram in counts[sentence]})
    log_pairs = math.log(len(references))
    index = {gram: number for number, gram in enumerate(frequency)}
    idf = {gram: log_pairs - math.log(count) for gram, count in frequency.items()}

    # Postings: for each n-gram, the sentences that hold it and its weight in them.
    grams = np.fromiter((index[gram] for count in counts.values() for gram in count), dtype=np.int64)
    lengths = np.fromiter((len(count) for count in counts.values()), dtype=np.int64, count=len(counts))
    sentences_of = np.repeat(np.arange(len(counts)), lengths)
    values = np.fromiter((times * idf[gram] for count in counts.values() for gram, times in count.items()), dtype=np.float64)
    orders = np.fromiter((len(gram) - 1 for count in counts.values() for gram in count), dtype=np.int64)
    norms = np.sqrt(np.bincount(orders * len(counts) + sentences_of, weights=values**2, minlength=_ORDERS * len(counts)))
    norms = norms.reshape(_ORDERS, len(counts))  # [n, S]
    order = np.argsort(grams, kind="stable")
    sentences_of, values = sentences_of[order], values[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(grams, minlength=len(index)))])
    # pycocoevalcap measures a length in bigrams.
    reference_lengths = np.array([_length(count) for count in counts.values()], dtype=np.float64)
    shares = np.array(list(weights.values()))

    scores = np.zeros(len(candidates))
    for number, candidate in enumerate(candidates):
        count = _ngrams(candidate)
        similarity = np.zeros((_ORDERS, len(counts)))
        squares = np.zeros(_ORDERS)
        for gram, times in count.items():
            value = times * idf.get(gram, log_pairs)
            squares[len(gram) - 1] += value**2
            if gram in index:
                held = slice(starts[index[gram]], starts[index[gram] + 1])
                similarity[len(gram) - 1, sentences_of[held]] += np.minimum(value, values[held]) * values[held]
        scale = np.sqrt(squares)[:, None] * norms
        np.divide(similarity, scale, out=similarity, where=scale != 0)
        penalty = np.exp(-((_length(count) - reference_lengths) ** 2) / (2 * _SIGMA**2))
        scores[number] = 10.0 * float((similarity.mean(axis=0) * penalty) @ shares) / len(references)
    return scores


def _ngrams(sentence: str) -> Counter[tuple[str, ...]]:
    words = sentence.split()
    return Counter(tuple(words[start : start + n]) for n in range(1, _ORDERS + 1) for start in range(len(words) - n + 1))


def _length(count: Mapping[tuple[str, ...], int]) -> int:
    return sum(times for gram, times in count.items() if len(gram) == 2)
