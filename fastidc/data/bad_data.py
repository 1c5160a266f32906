"""What becomes of pairs with an image that is missing or bad: `--on-bad-data raise|skip|limit:N`.

"raise" ends at the first. The others look at every image in full before anything is made of them, as `fastidc check` does, and leave such pairs
out, whole; "limit:N" ends where there are more than N of them. What the look finds bad is bad whichever loader reads: also what DALI would decode and
Pillow does not, and an image of one pixel's width. Flaws of annotations are not the images' and always end.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastidc.data.cache import Cache, default_path, folder_of, relative_names
from fastidc.data.check_images import look_at_all
from fastidc.data.datasets.base import PairRecord
from fastidc.data.datasets.flaws import Flaw
from fastidc.data.limits import shown
from fastidc.data.loaders import distinct_images
from fastidc.data.quarantine import Quarantine
from fastidc.data.records import Loaded, load
from fastidc.errors import FastidcError

Reasons = dict[str, tuple[tuple[str, str], ...]]  # pair -> (kind, sentence) of why, as in `Quarantine.pairs`


def most_of(text: str) -> float | None:
    """How many bad pairs ``--on-bad-data`` puts up with: None for "raise", infinity for "skip". FastidcError for another text."""
    if text == "raise":
        return None
    if text == "skip":
        return math.inf
    if match := re.fullmatch(r"limit:([0-9]{1,12})", text):
        return int(match[1])
    raise FastidcError(
        f"--on-bad-data is {text!r}; raise, skip or limit:N was expected, N being the bad pairs to put up with, as in limit:20."
    )


@dataclass(frozen=True)
class LeftOut:
    """Pairs that are left out, and of which splits they are."""

    held: Quarantine
    splits: Mapping[str, int]

    def said(self) -> str:
        """ "RUN/left_out.json: 3 pairs are left out (2 of train, 1 of test): image-truncated 2, image-empty 1." """
        return self.held.said(self.splits)

    def facts(self) -> dict:
        """What metrics.json says of them."""
        kinds = Counter(kind for reasons in self.held.pairs.values() for kind in dict.fromkeys(kind for kind, _ in reasons))
        return {"pairs": len(self.held.pairs), "splits": {k: n for k, n in self.splits.items() if n}, "kinds": dict(kinds.most_common())}

    def named(self, most: int = 20) -> list[str]:
        """A sentence for each of the first ``most`` pairs, and one for the rest."""
        pairs = list(self.held.pairs.items())
        said = [f"left out: {shown(key.strip())}: {reasons[0][1]}" for key, reasons in pairs[:most]]
        return said + ([f"... and {len(pairs) - most:,} more: `fastidc check` names all."] if len(pairs) > most else [])

    def check(self, most: float, data: str | Path) -> None:
        """FastidcError where there are more than ``most``."""
        pairs = self.held.pairs
        if len(pairs) > most:
            key, reasons = next(iter(pairs.items()))
            raise FastidcError(
                f"{data}: {len(pairs):,} pair{'s have' if len(pairs) > 1 else ' has'} a bad image, more than the {most:,} of --on-bad-data "
                f"limit:{most}; the first is {shown(key.strip())!r}: {reasons[0][1]}; mend them (`fastidc check` names all), or raise the limit."
            )


def counted(loaded: Loaded, pairs: Collection[str]) -> dict[str, int]:
    """Split -> how many of ``pairs`` are of it."""
    return {split: sum(id_ in pairs for id_ in ids) for split, ids in loaded.ids.items()}


def bad_pairs(loaded: Loaded, good: Collection[Path] = (), workers: int | None = None, progress: bool = True) -> Reasons:
    """Every pair with an image that is missing or that `fastidc.data.check_images.look` finds bad, in the records' order. ``good``: images that need no
    look, see `known_good`."""
    paths = distinct_images(loaded.records.values())
    seen = look_at_all([path for path in paths if path not in good], "full", workers, progress)
    bad = {path: (one.kind, f"{shown(path)}: {one.what}") for path, one in seen.items() if one.kind and one.level == "bad"}
    out: Reasons = {flaw.key: ((flaw.kind, _clause(flaw)),) for flaw in loaded.missing}
    for record in (record for part in loaded.records.values() for record in part):
        if found := tuple(bad[path] for path in dict.fromkeys(record.images) if path in bad):
            out[record.id] = found
    places = {id_: place for place, id_ in enumerate(id_ for ids in loaded.ids.values() for id_ in ids)}
    return dict(sorted(out.items(), key=lambda pair: places.get(pair[0], -1)))


def _clause(flaw: Flaw) -> str:
    return f"{flaw.where}: {flaw.what}" if flaw.image is None else f"{shown(flaw.image)}: {flaw.what}"


def without(loaded: Loaded, pairs: Mapping[str, object], source: str | Path) -> dict[str, list[PairRecord]]:
    """The records that are none of ``pairs``. FastidcError where another one has an image missing: ``source`` said of its images that they are there."""
    for flaw in loaded.missing:
        if flaw.key not in pairs:
            raise FastidcError(f"{flaw} It was there when {source} was made.")
    return {split: [record for record in part if record.id not in pairs] for split, part in loaded.records.items()}


def leave_out(
    root: str | Path, dataset: str, text: str, cache: Path, workers: int | None = None, **how
) -> tuple[dict[str, list[PairRecord]], LeftOut]:
    """The records from which ``cache`` is to be built, and the pairs that are left out of it; what an earlier one holds needs no look. ``text``: "skip" or
    "limit:N"; ``how``: as for `fastidc.data.records.load_records`. FastidcError beyond the limit."""
    loaded = load(root, dataset, spare=True, **how)
    pairs = bad_pairs(loaded, known_good(root, cache, distinct_images(loaded.records.values())), workers)
    left = LeftOut(Quarantine(cache, loaded.kind, loaded.fingerprint, pairs), counted(loaded, pairs))
    left.check(most_of(text), root)
    return without(loaded, pairs, cache), left


def known_good(root: str | Path, cache: Path | None, paths: Iterable[Path]) -> set[Path]:
    """Images that Pillow has decoded for a cache, and that have not changed since by length and time: ``cache``, or those in the data set's folder,
    of whatever size. A cache of DALI's does not count, and what cannot be read as a cache neither; of one pixel's width is none."""
    files = [cache] if cache is not None else sorted(folder_of(root).glob(default_path(root, 0).name.replace("0", "*")))
    paths, good = list(paths), set()
    for file in files:
        try:
            opened = Cache(file)
        except FastidcError:
            continue
        if opened.about["builder"]["name"] != "pillow":
            continue
        entries = {entry.path: entry for entry in opened.entries if entry.verdict == "ok" and min(entry.width, entry.height) > 1}
        for path, name in zip(paths, relative_names(root, paths), strict=True):
            if (entry := entries.get(name)) is not None and path not in good and _same(path, entry.bytes, entry.mtime_ns):
                good.add(path)
    return good


def _same(path: Path, length: int, mtime_ns: int) -> bool:
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return False
    return (facts.st_size, facts.st_mtime_ns) == (length, mtime_ns)
