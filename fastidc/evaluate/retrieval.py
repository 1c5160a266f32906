"""Recall, median and mean rank of sentence-pair retrieval in both directions, with ties that are said and not left to a sort.

In CLEVR-Change many pairs share a caption, so exact ties are common, and the official code rewards them (``clip4idc.md`` 7.1).
Ties are exact only where equal sentences have equal features to the last bit: encode each distinct sentence once (`unique_sentences`)
and repeat its row of the similarity matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastidc.errors import FastidcError

TIES = ("strict", "mean", "optimistic", "legacy")
_CHUNK = 1 << 24  # matrix entries that are compared at a time


def unique_sentences(sentences: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Distinct sentences in order of first appearance [U], and for each sentence [T] its index among them (int64)."""
    index: dict[str, int] = {}
    inverse = [index.setdefault(sentence, len(index)) for sentence in sentences]
    return list(index), np.array(inverse, dtype=np.int64)


def rank(scores: Any, true: Any, ties: str = "strict") -> np.ndarray:
    """Rank from 1 of the true column [Q] in each row of ``scores`` [Q, N], higher scores first.

    With ``greater`` columns above the true one's score and ``equal`` others at it, ``ties`` gives:
    "strict"      1 + greater + equal: a tie is a loss, so no tie can raise a metric (pessimistic)
    "mean"        1 + greater + equal / 2
    "optimistic"  1 + greater
    Int64 [Q], for "mean" float64. Raises FastidcError for scores that are not finite and for another name.
    """
    if ties not in TIES[:3]:
        raise FastidcError(f"ties {ties!r} of a rank is not one of {', '.join(TIES[:3])}")
    scores, true = _matrix(scores), _indices(true, "true column")
    if true.shape != scores.shape[:1] or (true.size and not (true.min() >= 0 and true.max() < scores.shape[1])):
        raise FastidcError(f"the true columns do not fit a {scores.shape[0]} x {scores.shape[1]} matrix: give one valid index for each row")
    greater = np.empty(len(scores), dtype=np.int64)
    equal = np.empty(len(scores), dtype=np.int64)
    for rows in _chunks(scores):
        own = np.take_along_axis(scores[rows], true[rows, None], axis=1)
        greater[rows] = np.count_nonzero(scores[rows] > own, axis=1)
        equal[rows] = np.count_nonzero(scores[rows] == own, axis=1) - 1
    if ties == "optimistic":
        return 1 + greater
    return 1 + greater + (equal if ties == "strict" else equal / 2)


def retrieval_metrics(similarity: Any, text_to_pair: Any, *, ties: str = "strict", ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """R@k in percent, median and mean rank (from 1) of sentences against pairs and of pairs against groups of sentences.

    ``similarity``: [T sentences, P pairs], a float array or tensor, as it is computed (fp32 stays fp32). ``text_to_pair``: [T] int, the
    pair of each sentence; every pair has at least one. ``ks``: the cut-offs; Spot-the-Diff's table needs (10, 20, 50).

    ``text_to_pair``: every sentence looks for its pair. ``pair_to_text``: every pair looks for its group among P groups, and
    score(pair, group) is the maximum over the group's sentences. ``ties`` as in `rank`; "legacy" repeats the official code: text->pair
    by a double argsort, where the sort's order decides a tie, pair->text by ``np.where(sorted == own)``, where every column tied with
    the true one counts as one more query. Published numbers are "legacy".

    Returns ``{"text_to_pair": {"R@1", ..., "MdR", "MnR", "queries"}, "pair_to_text": {...}, "ties": ties}``. MdR is the lower median, as
    torch gives it to the official text->pair ranks; for legacy pair->text it is numpy's, which may end in .5.
    Raises FastidcError for shapes that do not fit, similarities that are not finite, and a pair without a sentence.
    """
    ranks = retrieval_ranks(similarity, text_to_pair, ties)
    middle = np.median if ties == "legacy" else _lower_median
    forth, back = ranks["text_to_pair"][0], ranks["pair_to_text"][0]
    return {"text_to_pair": _summary(forth, ks, _lower_median), "pair_to_text": _summary(back, ks, middle), "ties": ties}


def retrieval_ranks(similarity: Any, text_to_pair: Any, ties: str = "strict") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Direction -> (ranks from 1, the pair of each), both [queries]; arguments and errors are `retrieval_metrics`'s.

    "legacy" ranks of pair_to_text are more than the pairs where columns tie.
    """
    if ties not in TIES:
        raise FastidcError(f"ties {ties!r} is not one of {', '.join(TIES)}")
    similarity, owner = _matrix(similarity), _indices(text_to_pair, "text_to_pair")
    texts, pairs = similarity.shape
    if owner.shape != (texts,):
        raise FastidcError(f"text_to_pair has {owner.size} entries for {texts} sentences; give the pair of each row of the similarity")
    if texts == 0 or pairs == 0:
        raise FastidcError(f"the similarity is {texts} x {pairs}: there is nothing to rank")
    outside = np.flatnonzero((owner < 0) | (owner >= pairs))
    if outside.size:
        raise FastidcError(f"text_to_pair[{outside[0]}] is {owner[outside[0]]}, but the similarity has pairs 0 to {pairs - 1}")
    lonely = np.flatnonzero(np.bincount(owner, minlength=pairs) == 0)
    if lonely.size:
        raise FastidcError(f"pair {lonely[0]} has no sentence, so it cannot be looked for; drop its column from the similarity")
    groups = _group_maximum(similarity, owner)  # [P pairs, P groups]
    own = np.arange(pairs)
    if ties == "legacy":
        return {"text_to_pair": (_legacy_text_ranks(similarity, owner), owner), "pair_to_text": _legacy_pair_ranks(groups)}
    return {"text_to_pair": (rank(similarity, owner, ties), owner), "pair_to_text": (rank(groups, own, ties), own)}


def _summary(ranks: np.ndarray, ks: Sequence[int], median: Any) -> dict[str, float | int]:
    recalls = {f"R@{k}": float(np.count_nonzero(ranks <= k)) * 100 / len(ranks) for k in ks}
    return {**recalls, "MdR": float(median(ranks)), "MnR": float(np.mean(ranks)), "queries": len(ranks)}


def _lower_median(ranks: np.ndarray) -> float:
    middle = (len(ranks) - 1) // 2
    return float(np.partition(ranks, middle)[middle])


def _group_maximum(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """[P pairs, P groups]: for each pair the best score among the sentences of each group."""
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(similarity.shape[1]))
    result = np.empty((similarity.shape[1], similarity.shape[1]), dtype=similarity.dtype)
    step = max(1, _CHUNK // max(1, len(owner)))
    for start in range(0, similarity.shape[1], step):
        columns = slice(start, start + step)
        result[columns] = np.maximum.reduceat(similarity[order, columns], starts, axis=0).T
    return result


def _legacy_text_ranks(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    import torch

    ranks = np.empty(len(similarity), dtype=np.int64)
    for rows in _chunks(similarity):
        # float64, as the official padding with -inf makes it; the kind of sort decides ties.
        order = torch.argsort(torch.from_numpy(similarity[rows].astype(np.float64)), dim=-1, descending=True)
        places = torch.argsort(order, dim=-1).numpy()
        ranks[rows] = 1 + np.take_along_axis(places, owner[rows, None], axis=1)[:, 0]
    return ranks


def _legacy_pair_ranks(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One rank for every column that ties with the true one, hence more ranks than rows; and the row of each."""
    first = rank(groups, np.arange(len(groups)), "optimistic")
    last = rank(groups, np.arange(len(groups)), "strict")
    counts = last - first + 1
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + steps, np.repeat(np.arange(len(groups)), counts)


def _chunks(matrix: np.ndarray) -> Iterable[slice]:
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _matrix(values: Any) -> np.ndarray:
    values = _array(values)
    if values.ndim != 2:
        raise FastidcError(f"the similarity has {values.ndim} dimensions; give [sentences, pairs]")
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    for rows in _chunks(values):
        bad = np.argwhere(~np.isfinite(values[rows]))
        if bad.size:  # a NaN would be above nothing and below nothing: rank 1 for free
            row, column = int(bad[0, 0]) + rows.start, int(bad[0, 1])
            raise FastidcError(f"similarity[{row}, {column}] is {values[row, column]}; every entry has to be finite")
    return values


def _indices(values: Any, name: str) -> np.ndarray:
    values = _array(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise FastidcError(f"{name} is not a list of whole numbers; give one index for each row")
    return values.astype(np.int64)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor of any device; numpy knows no bfloat16
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
        return values.numpy()
    return np.asarray(values)
