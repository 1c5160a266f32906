"""BLEU, ROUGE-L and CIDEr of many captions: pycocoevalcap's formulas in array operations.

Equal to pycocoevalcap's own classes to 1e-9 (the test suite compares them), which take half a minute for CLEVR-Change's 7,970 pairs with
their subsets. What a pair contributes is counted once; a subset adds it up with the document frequencies of its own references.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ORDERS = 4
_SIGMA = 6.0
_BETA = 1.2
_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's guards against empty denominators; they are part of its values

BLEU_FIELDS = 2 * _ORDERS + 2
"""Columns of a pair's BLEU statistics: matched n-grams [4], n-grams of the caption [4], its words, those of its closest reference."""


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..4 [..., 4] of added-up statistics [..., `BLEU_FIELDS`]; of one pair's statistics, that caption's."""
    correct, guess = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
    precisions = np.cumprod((correct + _TINY) / (guess + _SMALL), axis=-1)
    scores = precisions ** (1.0 / np.arange(1, _ORDERS + 1))
    ratio = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
    return scores * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))[..., None]


class Ngrams:
    """What BLEU, ROUGE-L and CIDEr need of tokenised ``captions`` [N] and tokenised ``references`` [N][R >= 1].

    ``bleu``: float64 [N, `BLEU_FIELDS`]. ``rouge``: float64 [N]. `cider` depends on who is scored together.
    """

    def __init__(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> None:
        index: dict[str, int] = {}
        own = np.array([index.setdefault(caption, len(index)) for caption in captions], dtype=np.int64)
        rows = np.array([index.setdefault(text, len(index)) for texts in references for text in texts], dtype=np.int64)
        self.pairs = len(captions)
        self._own, self._rows = own, rows  # sentence of each caption [N], of each reference [T]
        self._pair_of = np.repeat(np.arange(self.pairs), [len(texts) for texts in references])  # [T]
        self._references = np.bincount(self._pair_of, minlength=self.pairs)
        sentences = list(index)
        self._count(sentences)
        self._match()
        self.bleu = self._bleu()
        self.rouge = _rouge(sentences, own, rows, self._pair_of, self.pairs)

    def _count(self, sentences: list[str]) -> None:
        """Every distinct sentence's n-grams, each with its number: flat arrays, sentence after sentence."""
        words: dict[str, int] = {}
        split = [sentence.split() for sentence in sentences]
        flat = np.array([words.setdefault(word, len(words)) for text in split for word in text], dtype=np.int64)
        self._words = np.array([len(text) for text in split], dtype=np.int64)
        sentence_of = np.repeat(np.arange(len(split)), self._words)
        left = np.repeat(np.cumsum(self._words), self._words) - np.arange(len(flat))  # words from here to the sentence's end
        parts, grams, first = [], flat, 0
        for n in range(1, _ORDERS + 1):
            if n > 1:  # an n-gram is the one that is shorter by a word, and the word after it
                starts = np.flatnonzero(left >= n)
                keys = np.zeros(len(flat), dtype=np.int64)
                _, keys[starts] = np.unique(grams[starts] * max(1, len(words)) + flat[starts + n - 1], return_inverse=True)
                grams = keys
            else:
                starts = np.arange(len(flat))
            kinds = int(grams[starts].max()) + 1 if len(starts) else 0
            held, times = np.unique(sentence_of[starts] * max(1, kinds) + grams[starts], return_counts=True)
            owner, gram = np.divmod(held, max(1, kinds))
            parts.append((owner, gram + first, times, np.full(len(held), n - 1)))
            first += kinds
        owner, gram, times, order = (np.concatenate(column) for column in zip(*parts, strict=True))
        by_sentence = np.argsort(owner, kind="stable")  # within a sentence n-grams stay in order
        self._sentence, self._gram, self._times, self._order = (column[by_sentence] for column in (owner, gram, times, order))
        self._starts = np.searchsorted(self._sentence, np.arange(len(sentences) + 1))
        self._grams = first

    def _entries(self, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For a list of sentences, with repetitions, [S]: the entries of each, and the place in the list that each belongs to."""
        sizes = self._starts[sentences + 1] - self._starts[sentences]
        place = np.repeat(np.arange(len(sentences)), sizes)
        offsets = np.arange(len(place)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._starts[sentences][place] + offsets, place

    def _match(self) -> None:
        """N-grams that a caption shares with each of its references, and those that a pair's references hold at all."""
        captions, pair = self._entries(self._own)
        held = pair * self._grams + self._gram[captions]  # sorted: by pair, and by n-gram within it
        entries, row = self._entries(self._rows)
        keys = self._pair_of[row] * self._grams + self._gram[entries]
        by_key = np.argsort(keys, kind="stable")
        ordered = keys[by_key]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))
        most = np.maximum.reduceat(self._times[entries[by_key]], first) if len(first) else np.zeros(0, dtype=np.int64)
        self._documents = np.divmod(ordered[first], max(1, self._grams))  # (pair, n-gram), each once

        place, found = _lookup(ordered[first], held)
        clipped = np.minimum(self._times[captions][found], most[place[found]])
        slots = pair[found] * _ORDERS + self._order[captions][found]
        self._correct = np.bincount(slots, weights=clipped, minlength=self.pairs * _ORDERS).reshape(-1, _ORDERS)

        place, found = _lookup(held, keys)
        ours, theirs = captions[place[found]], entries[found]
        self._shared = (row[found], self._gram[theirs], np.minimum(self._times[ours], self._times[theirs]) * self._times[theirs])
        self._shared_slot = self._shared[0] * _ORDERS + self._order[theirs]

    def _bleu(self) -> np.ndarray:
        words = self._words[self._own]
        guesses = np.maximum(0, words[:, None] - np.arange(_ORDERS))
        lengths = self._words[self._rows]
        distance = np.abs(lengths - words[self._pair_of])
        order = np.lexsort((lengths, distance, self._pair_of))  # the closest first, of two the shorter
        closest = lengths[order][np.cumsum(self._references) - self._references]
        return np.column_stack([self._correct, guesses, words, closest]).astype(np.float64)

    def cider(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """CIDEr of the pairs ``chosen`` [n] (all by default), float64 [n], document frequencies being those of their references alone.

        Where these hold no word at all, pycocoevalcap fails; here all are 0.
        """
        chosen = np.arange(self.pairs) if chosen is None else chosen
        inside = np.zeros(self.pairs, dtype=bool)
        inside[chosen] = True
        pair, gram = self._documents
        frequency = np.bincount(gram[inside[pair]], minlength=self._grams)
        idf = np.log(float(len(chosen))) - np.log(np.maximum(1.0, frequency))
        slots = self._sentence * _ORDERS + self._order
        squares = np.bincount(slots, weights=(self._times * idf[self._gram]) ** 2, minlength=len(self._words) * _ORDERS)
        norms = np.sqrt(squares).reshape(-1, _ORDERS)
        row, gram, product = self._shared
        mine = inside[self._pair_of[row]]
        weights = product[mine] * idf[gram[mine]] ** 2
        values = np.bincount(self._shared_slot[mine], weights=weights, minlength=len(self._rows) * _ORDERS)
        values = values.reshape(-1, _ORDERS).astype(np.float64, copy=False)  # of nothing, numpy's sums are whole numbers
        scale = norms[self._own[self._pair_of]] * norms[self._rows]
        np.divide(values, scale, out=values, where=scale != 0)
        bigrams = np.maximum(0, self._words - 1)  # pycocoevalcap measures a length in bigrams
        delta = bigrams[self._own[self._pair_of]] - bigrams[self._rows]
        similarity = values.mean(axis=1) * np.exp(-(delta.astype(np.float64) ** 2) / (2 * _SIGMA**2))
        sums = np.bincount(self._pair_of, weights=similarity, minlength=self.pairs)
        return (10.0 * sums / self._references)[chosen]


def _lookup(ordered: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of ``keys`` stands in ``ordered``, and which of them do."""
    place = np.searchsorted(ordered, keys)
    if not len(ordered):
        return place, np.zeros(len(keys), dtype=bool)
    return place, ordered[np.minimum(place, len(ordered) - 1)] == keys


def _rouge(sentences: list[str], own: np.ndarray, rows: np.ndarray, pair_of: np.ndarray, pairs: int) -> np.ndarray:
    # Split at single blanks, as pycocoevalcap does: an empty sentence is one empty word there, which equals another one.
    split = [sentence.split(" ") for sentence in sentences]
    together = own[pair_of] * len(sentences) + rows
    distinct, inverse = np.unique(together, return_inverse=True)
    masks: dict[int, dict[str, int]] = {}
    lengths = np.zeros(len(distinct))
    for number, (caption, reference) in enumerate(zip(*(column.tolist() for column in np.divmod(distinct, len(sentences))), strict=True)):
        if caption not in masks:
            masks[caption] = _places(split[caption])
        lengths[number] = _common(masks[caption], len(split[caption]), split[reference])
    sizes = np.array([len(text) for text in split], dtype=np.float64)
    common = lengths[inverse]
    precision, recall = np.zeros(pairs), np.zeros(pairs)
    np.maximum.at(precision, pair_of, common / sizes[own[pair_of]])
    np.maximum.at(recall, pair_of, common / sizes[rows])
    scores = np.zeros(pairs)
    np.divide((1 + _BETA**2) * precision * recall, recall + _BETA**2 * precision, out=scores, where=(precision != 0) & (recall != 0))
    return scores


def _places(words: list[str]) -> dict[str, int]:
    """Word -> the places where it stands, as bits."""
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    return places


def _common(places: dict[str, int], size: int, words: list[str]) -> int:
    """Length of the longest common subsequence, a row of its table in one whole number (Hyyro 2004)."""
    full = (1 << size) - 1
    row = full
    for word in words:
        if mask := places.get(word):
            matched = row & mask
            row = (row + matched | row - matched) & full
    return size - row.bit_count()
