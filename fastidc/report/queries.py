"""Sentences and the pairs that an adapted model finds for them, among those of the page."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastidc.describe.loading import Ready
from fastidc.describe.search import embed_texts
from fastidc.evaluate.retrieval import rank
from fastidc.report.gallery import Pair, Pictures, drawn
from fastidc.report.page import Hit, Query

QUERIES, TOP = 12, 5


def queries(pairs: Sequence[Pair], seen: Sequence[Pictures], embeddings: Tensor, ready: Ready) -> list[Query]:
    """`QUERIES` sentences, the first of pairs that are drawn, and the `TOP` pairs nearest to each; embeddings [P, E], of length 1.

    A rank counts every other pair with the same cosine against the model (strict ties). Pairs without a sentence ask nothing.
    """
    asking = [i for i, pair in enumerate(pairs) if pair.references]
    if not asking or len(pairs) < 2:
        return []
    chosen = [int(i) for i in drawn([str(i) for i in asking], QUERIES)]
    sentences = [pairs[i].references[0] for i in chosen]
    cosines = (embed_texts(ready, sentences) @ embeddings.T).numpy()
    ranks = rank(cosines, np.array(chosen), "strict")
    found = []
    for own, text, row, place in zip(chosen, sentences, cosines, ranks.tolist(), strict=True):
        nearest = np.argsort(-row, kind="stable")[:TOP].tolist()
        found.append(Query(text, place, [Hit(i, pairs[i].id, float(row[i]), i == own, seen[i].hit) for i in nearest]))
    return found
