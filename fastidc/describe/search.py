"""Pairs and sentences as vectors, and which are nearest."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.describe.loading import load
from fastidc.describe.pixels import Image, batches
from fastidc.errors import FastidcError
from fastidc.evaluate.retrieval import unique_sentences
from fastidc.packed import PackedText

_CHUNK = 1 << 22  # products that exist at a time


def embed_pairs(
    model: Any,
    pairs: Iterable[tuple[Image, Image]],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    left_out: dict[int, FastidcError] | None = None,
    bar: Any = None,
) -> Tensor:
    """(before, after) each, as `fastidc.Describer.many` takes them -> [P, E] fp32 on the CPU, of length 1.

    model: as `fastidc.describe.loading.load` takes it; an adapted run serves best. left_out: where it is given, pairs whose images cannot be
    read have no row, and their errors go there under their number from 0; else the first of them is raised.
    """
    ready = load(model)
    parts, number = [], 0
    for batch in batches(pairs, ready.model.config.image_size, batch_size, workers, ready.device.type == "cuda"):
        for error in batch.errors:
            if error is not None:
                if left_out is None:
                    raise error
                left_out[number] = error
            number += 1
        if len(batch.images):
            with ready.asked():
                embedding = ready.model.encode_batch(batch.images.to(ready.device, non_blocking=True), False)[0][:, 0]
            parts.append(F.normalize(embedding.float(), dim=-1).cpu())
        if bar is not None:
            bar.update(len(batch.errors))
    return torch.cat(parts) if parts else torch.empty(0, ready.model.config.embed_dim)


def embed_texts(model: Any, sentences: Sequence[str], *, batch_size: int = 512) -> Tensor:
    """Sentences -> [T, E] fp32 on the CPU, of length 1; equal sentences have equal rows to the last bit.

    model: as in `embed_pairs`. Sentences are cut to the words that the model was trained with.
    """
    ready = load(model)
    distinct, rows = unique_sentences(sentences)
    ids = [ready.tokenizer.text(sentence, ready.max_words) for sentence in distinct]
    parts = []
    for first in range(0, len(ids), batch_size):
        with ready.asked():
            text = ready.model.encode_text(PackedText.of(ids[first : first + batch_size]).to(ready.device))
        parts.append(F.normalize(text.float(), dim=-1).cpu())
    return torch.cat(parts)[torch.from_numpy(rows)] if parts else torch.empty(0, ready.model.config.embed_dim)


def embed_query(model: Any, text: str) -> Tensor:
    """`embed_texts` of one sentence, [E]; FastidcError where the model knows none of its words."""
    ready = load(model)
    if not ready.tokenizer.encode(text):
        raise FastidcError(f"the query {text!r} has no word that {ready.source} knows; ask in words of its training captions.")
    return embed_texts(ready, [text])[0]


def rank(query: Any, candidates: Any, top: int | None = None) -> list[tuple[int, float]]:
    """(number from 0, cosine) of the ``top`` candidates nearest to ``query``, nearest first; of equals the earlier one comes first.

    query [E], candidates [N, E], tensors or arrays, of any length but 0. FastidcError for shapes that do not fit, for numbers that are not
    finite, and for a top below 1.
    """
    query, candidates = (np.asarray(x.detach().cpu().float() if isinstance(x, Tensor) else x) for x in (query, candidates))
    if query.ndim != 1 or candidates.ndim != 2 or candidates.shape[1] != len(query):
        raise FastidcError(f"a query [E] and candidates [N, E] were expected, got {list(query.shape)} and {list(candidates.shape)}.")
    if top is not None and top < 1:
        raise FastidcError(f"top must be at least 1, got {top}.")
    wanted = _unit(query[None], "the query")[0]
    scores = np.empty(len(candidates))
    step = max(1, _CHUNK // max(1, len(query)))
    for first in range(0, len(candidates), step):
        rows = slice(first, first + step)
        # not a BLAS product, which may add up equal rows in different orders and so break their tie
        scores[rows] = (_unit(candidates[rows], "candidate", first) * wanted).sum(axis=1)
    order = np.argsort(-scores, kind="stable")[:top]
    return [(int(i), float(scores[i])) for i in order]


def _unit(rows: np.ndarray, name: str, first: int | None = None) -> np.ndarray:
    rows = rows.astype(np.float64)
    length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    bad = np.flatnonzero(~(np.isfinite(length[:, 0]) & (length[:, 0] > 0)))
    if bad.size:
        which = name if first is None else f"{name} {first + int(bad[0])}"
        raise FastidcError(f"{which} has no direction: its length is {length[bad[0], 0]}.")
    return rows / length
