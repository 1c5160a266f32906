"""A split for data that come without one."""

import hashlib
from collections.abc import Sequence

from fastidc.data.datasets.base import Annotations, Entry, Report


def hashed_split(name: str, entries: Sequence[Entry], report: Report | None) -> Annotations:
    """80/10/10 by a keyed hash of the ids: the same on every machine and in every order of the file.

    Of n >= 5 pairs max(1, n // 10) are test, as many val, the rest train; fewer than 5 are all train. Each split keeps the order of
    ``entries``. A pair's place depends on its id and not on its images: two pairs that share an image may come apart.
    """
    count = max(1, len(entries) // 10) if len(entries) >= 5 else 0
    ranked = sorted((entry.id for entry in entries), key=_digest)
    place = dict.fromkeys(ranked, "train") | dict.fromkeys(ranked[count : 2 * count], "val") | dict.fromkeys(ranked[:count], "test")
    out: Annotations = {"train": [], "val": [], "test": []}
    for entry in entries:
        out[place[entry.id]].append(entry)
    if report is not None:
        sizes = ", ".join(f"{len(out[split])} {split}" for split in out)
        report(f"{name}: no split is given, so the pairs are split by a hash of their ids: {sizes}.")
    return out


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=b"fastidc split").digest()
