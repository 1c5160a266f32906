"""How far a score would move with other pairs: 95 % bootstrap intervals from sufficient statistics of each pair.

Pairs are drawn with replacement (their sentences stay together), `RESAMPLES` times, from a seed; an interval holds the middle 95 % of the
resampled scores (percentile bootstrap). BLEU and METEOR add up the drawn pairs' counts, as their corpus scores do. ROUGE-L and CIDEr
average the drawn pairs' scores; CIDEr's document frequencies stay those of the set that is scored, or every resample would be measured
with another ruler. An interval says what the choice of pairs does, and nothing of what another training seed would.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fastidc.evaluate.ngrams import bleu_of

RESAMPLES = 1000
LEVEL = 0.95
IDF_NOTE = "document frequencies are fixed to the evaluated set"

_AT_ONCE = 1 << 22  # draws that are held at a time
# METEOR 1.5 for English, task "rank", as its jar ships them: what fragments cost, and what stems, synonyms and paraphrases are worth.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


def draws(pairs: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of ``pairs`` is drawn, in blocks float64 [some, pairs] of ``resamples`` rows in all. The same seed, the same draws."""
    generator = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // max(1, pairs))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        chosen = generator.integers(0, pairs, size=(rows, pairs)) + np.arange(rows)[:, None] * pairs
        yield np.bincount(chosen.ravel(), minlength=rows * pairs).reshape(rows, pairs).astype(np.float64)


def middle(values: np.ndarray, level: float = LEVEL) -> list[float]:
    """[lower, upper] of the middle ``level`` of resampled values [resamples]."""
    return [float(value) for value in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def bootstrap(statistics: np.ndarray, score: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """``score`` of every resample: the statistics [pairs, k] of the drawn pairs added up, [resamples, k], go in."""
    return np.concatenate([score(block @ statistics) for block in draws(len(statistics), resamples, seed)])


def caption_intervals(
    bleu: np.ndarray, rouge: np.ndarray, cider: np.ndarray, meteor: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float] | None]:
    """Metric -> [lower, upper] of n pairs: ``bleu`` [n, 10] as `Ngrams.bleu`, ``rouge`` and ``cider`` [n], ``meteor`` [n, 23] or None."""
    columns = [bleu, rouge[:, None], cider[:, None]] + ([] if meteor is None else [meteor])
    last, pairs = bleu.shape[1], len(bleu)

    def score(sums: np.ndarray) -> np.ndarray:
        parts = [bleu_of(sums[:, :last]), sums[:, last : last + 2] / pairs]
        return np.concatenate(parts + ([] if meteor is None else [meteor_of(sums[:, last + 2 :])[:, None]]), axis=1)

    values = bootstrap(np.concatenate(columns, axis=1), score, resamples, seed)
    names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", *([] if meteor is None else ["METEOR"])]
    found: dict[str, list[float] | None] = {name: middle(values[:, column]) for column, name in enumerate(names)}
    return found if meteor is not None else found | {"METEOR": None}


def meteor_of(sums: np.ndarray) -> np.ndarray:
    """METEOR [...] of added-up statistics [..., 23], each row as `meteor_statistics` gives it: the formula of the jar's ``computeMetrics``."""
    length, reference, function, reference_function = (sums[..., column] for column in range(4))
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    # added in the jar's order: of references that are equally good to the last bit, the first one counts
    content_test, content_reference, function_test, function_of_reference = (
        [matches[..., module, column] * _WEIGHTS[module] * share for module in range(4)]
        for column, share in enumerate((_DELTA, _DELTA, 1.0 - _DELTA, 1.0 - _DELTA))
    )
    chunks, matched = sums[..., 20], sums[..., 21] + sums[..., 22]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = _added(content_test, function_test) / _weighted(length - function, function)
        recall = _added(content_reference, function_of_reference) / _weighted(reference - reference_function, reference_function)
        mean = 1.0 / ((1.0 - _ALPHA) / precision + _ALPHA / recall)
        score = mean * (1.0 - _GAMMA * (chunks / (matched / 2.0)) ** _BETA)
    return np.where(np.isnan(score), 0.0, np.maximum(score, 0.0))


def _added(content: Sequence[np.ndarray], function: Sequence[np.ndarray]) -> np.ndarray:
    return functools.reduce(operator.add, (*content, *function))


def _weighted(content: np.ndarray, function: np.ndarray) -> np.ndarray:
    return _DELTA * content + (1.0 - _DELTA) * function


def meteor_statistics(lines: Sequence[str]) -> np.ndarray | None:
    """The jar's statistics lines as float64 [n, 23]; None where they are not of that form, i.e. of another METEOR.

    Words of caption and reference, and function words of both; for each of four matchers the content words matched in caption and
    reference, then the function words; chunks; matched words of both. A caption that is its reference has one chunk, which the jar
    leaves out when it adds statistics up: here it is 0 from the start, which its own score does not show.
    """
    rows = [[float(number) for number in line.split()] for line in lines]
    if not rows or {len(row) for row in rows} != {23}:
        return None
    statistics = np.array(rows)
    matches = statistics[:, 4:20].reshape(-1, 4, 4)
    caption, reference = matches[..., (0, 2)].sum((-1, -2)), matches[..., (1, 3)].sum((-1, -2))
    whole = (caption == statistics[:, 0]) & (reference == statistics[:, 1]) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0.0
    return statistics


def retrieval_intervals(
    ranks: Mapping[str, tuple[np.ndarray, np.ndarray]], pairs: int, ks: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Direction -> metric -> [lower, upper] of R@k in percent, median (lower) and mean rank.

    ``ranks``: direction -> (ranks from 1, the pair of each), as `retrieval_ranks` gives them. Both directions draw the same pairs.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for direction, (values, owner) in ranks.items():
        columns = [np.bincount(owner, minlength=pairs), np.bincount(owner, weights=values, minlength=pairs)]
        columns += [np.bincount(owner, weights=values <= k, minlength=pairs) for k in ks]
        statistics = np.column_stack(columns).astype(np.float64)
        order = np.argsort(values, kind="stable")
        ordered, ordered_owner = values[order], owner[order]
        sums, medians = [], []
        for block in draws(pairs, resamples, seed):
            sums.append(block @ statistics)
            for row in block:
                reached = np.cumsum(row[ordered_owner])
                medians.append(ordered[np.searchsorted(reached, (reached[-1] + 1) // 2)])
        total = np.concatenate(sums)
        metrics = {f"R@{k}": middle(100 * total[:, 2 + column] / total[:, 0]) for column, k in enumerate(ks)}
        found[direction] = metrics | {"MdR": middle(np.array(medians)), "MnR": middle(total[:, 1] / total[:, 0])}
    return found
