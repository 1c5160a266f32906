"""Retrieval as `fastidc evaluate` reports it: a similarity matrix from a file, recall with intervals under each way to count ties."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastidc.errors import FastidcError
from fastidc.evaluate.intervals import RESAMPLES, retrieval_intervals
from fastidc.evaluate.paper import KS
from fastidc.evaluate.report import ruled
from fastidc.evaluate.retrieval import retrieval_metrics, retrieval_ranks

_DIRECTIONS = {"text_to_pair": "text -> pair", "pair_to_text": "pair -> text"}


def read_similarity(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """(similarity [T sentences, P pairs], text_to_pair int [T]) of an .npz with both by name, or a square .npy, sentence i being pair i's.

    Raises FastidcError that names the file and what it lacks. Nothing is unpickled.
    """
    path = Path(path)
    try:
        content: Any = np.load(path, allow_pickle=False)
        arrays = {name: content[name] for name in content.files} if hasattr(content, "files") else {"similarity": content}
    except OSError as error:
        raise FastidcError(f"{path} cannot be read ({error.strerror or error}); give an existing .npy or .npz file.") from error
    except Exception as error:  # zipfile, zlib and numpy have one each for a damaged file
        raise FastidcError(f"{path} is no .npy or .npz file of numbers ({error}); save it with numpy.save or numpy.savez.") from error
    if "similarity" not in arrays:
        raise FastidcError(f"{path}: has {', '.join(arrays) or 'no array'} and no `similarity`; save [sentences, pairs] under that name.")
    similarity = arrays["similarity"]
    if similarity.ndim != 2 or similarity.dtype.kind not in "fiu":
        raise FastidcError(f"{path}: similarity is {similarity.dtype} {list(similarity.shape)}; give numbers [sentences, pairs].")
    if "text_to_pair" in arrays:
        return similarity, arrays["text_to_pair"]
    if similarity.shape[0] != similarity.shape[1]:
        raise FastidcError(
            f"{path}: has {similarity.shape[0]} sentences for {similarity.shape[1]} pairs and does not say whose they are; save an .npz with "
            "`similarity` and `text_to_pair`, the pair of each sentence."
        )
    return similarity, np.arange(len(similarity))


def score_similarity(
    similarity: Any, text_to_pair: Any, ties: Sequence[str] = ("strict", "legacy"), resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """ties -> `retrieval_metrics`, each direction with ``intervals`` (pairs are resampled with all their sentences; none for 0 resamples)."""
    scores = {}
    for name in ties:
        scores[name] = retrieval_metrics(similarity, text_to_pair, ties=name, ks=KS)
        if resamples:
            ranks = retrieval_ranks(similarity, text_to_pair, name)
            for direction, found in retrieval_intervals(ranks, similarity.shape[1], KS, resamples, seed).items():
                scores[name][direction]["intervals"] = found
    return scores


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Recall in percent, median and mean rank: a row for each direction and way to count ties, with its interval below it."""
    names = [*(f"R@{k}" for k in KS), "MdR", "MnR"]
    rows = [["retrieval, recall in %", "ties", "queries", *names]]
    for direction, title in _DIRECTIONS.items():
        for ties, metrics in scores.items():
            values = metrics[direction]
            rows.append([title, ties, str(values["queries"]), *(f"{values[name]:.1f}" for name in names)])
            if intervals := values.get("intervals"):
                rows.append(["", "", "", *(f"{intervals[name][0]:.1f}-{intervals[name][1]:.1f}" for name in names)])
    return "\n".join(ruled(rows))
