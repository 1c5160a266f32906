"""Pairs that are left out, whole: what `fastidc check --quarantine FILE` writes, and what every reader of records honours.

The file is JSON: {"format", "version", "dataset", "root", "fingerprint", "pairs"}, a pair being {"id" or "place", "reasons": [{"kind", "sentence"}]};
the place, a file and an index or line, is that of an entry which has no id. The fingerprint is of the annotation files' content, so a data
set may be moved, and one whose annotations have changed is checked anew.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastidc.data.datasets.base import LARGEST
from fastidc.data.datasets.flaws import Flaw, Sink
from fastidc.errors import FastidcError
from fastidc.files import parse_json, read_plain, write_text

FORMAT, VERSION = "fastidc-quarantine", 1
_AGAIN = "make it again with `fastidc check DATA --quarantine FILE`"


class _HasId(Protocol):
    id: str


T = TypeVar("T", bound=_HasId)


@dataclass(frozen=True)
class Quarantine:
    """``pairs``: key (`fastidc.data.datasets.flaws.key_of`) -> kinds and sentences of why."""

    path: Path
    dataset: str
    fingerprint: str
    pairs: Mapping[str, tuple[tuple[str, str], ...]]

    def check(self, dataset: str, fingerprint: str) -> None:
        """FastidcError where it is another data set's."""
        if dataset != self.dataset:
            raise FastidcError(
                f"{self.path}: is the quarantine of a data set of the kind {self.dataset}, and this one is {dataset}; {_AGAIN}."
            )
        if fingerprint != self.fingerprint:
            raise FastidcError(
                f"{self.path}: is the quarantine of another data set, or of this one before its annotations changed; {_AGAIN}."
            )

    def said(self, counts: Mapping[str, int]) -> str:
        """ "q.json: 3 pairs are left out (2 of train, 1 of test): image-truncated 2, duplicate 1." ``counts``: pairs of each split."""
        places = ", ".join(f"{count} of {split}" for split, count in counts.items() if count)
        kinds = Counter(kind for reasons in self.pairs.values() for kind in dict.fromkeys(kind for kind, _ in reasons))
        why = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        total = len(self.pairs)
        said = f"{self.path}: {total} pair{'s are' if total != 1 else ' is'} left out"
        return f"{said}{f' ({places})' if places else ''}{f': {why}' if why else ''}."


class Forgiving(Sink):
    """Forgives the flaws of pairs in quarantine. The first of another one is kept until `settle`: that a quarantine is another data set's is to
    be said before."""

    def __init__(self, quarantines: Sequence[Quarantine]):
        self.quarantines = quarantines
        self.seen: set[str] = set()
        self._first: Flaw | None = None

    def __call__(self, flaw: Flaw) -> None:
        if flaw.level == "note":
            return
        if flaw.level == "bad" and any(flaw.key in one.pairs for one in self.quarantines):
            self.seen.add(flaw.key)
        elif self._first is None:
            self._first = flaw

    def settle(self) -> None:
        """Raises what was not forgiven."""
        if self._first is not None:
            raise self._first


def fingerprint_of(files: Iterable[Path]) -> str:
    """BLAKE2b-128, hexadecimal, of the names and contents of annotation files, in whatever order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(files, key=lambda path: path.name):
        try:
            content = read_plain(path, LARGEST)
        except OSError:  # which its reader says
            continue
        digest.update(f"{path.name}\n{len(content)}\n".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def without(records: Mapping[str, Sequence[T]], quarantine: Quarantine, known: Collection[str] = ()) -> dict[str, list[T]]:
    """``records`` (split -> records, or entries) without the pairs in quarantine, each whole: with its distractor and all its sentences.

    known: keys of pairs that are there without being among ``records``, because they could not be read. FastidcError where a pair in
    quarantine is nowhere.
    """
    ids = {record.id for part in records.values() for record in part}
    strange = [key for key in quarantine.pairs if key not in ids and key not in known]
    if strange:
        more = f" nor {len(strange) - 1:,} more" if len(strange) > 1 else ""
        raise FastidcError(f"{quarantine.path}: the data set has no pair {strange[0].strip()!r}{more}; {_AGAIN}.")
    return {split: [record for record in part if record.id not in quarantine.pairs] for split, part in records.items()}


def write(path: str | Path, dataset: str, root: str | Path, fingerprint: str, pairs: Mapping[str, Iterable[tuple[str, str]]]) -> Path:
    """Writes the file; ``pairs`` as in `Quarantine`. FastidcError where it cannot be written."""
    listed = [
        {"place" if key.startswith("\n") else "id": key.removeprefix("\n"), "reasons": [{"kind": k, "sentence": s} for k, s in reasons]}
        for key, reasons in pairs.items()
    ]
    facts = {"format": FORMAT, "version": VERSION, "dataset": dataset, "root": str(root), "fingerprint": fingerprint}
    return write_text(path, json.dumps({**facts, "pairs": listed}, indent=2) + "\n")  # ASCII: ids may be half characters


def read(path: str | Path) -> Quarantine:
    """FastidcError where the file is absent or not what `write` writes."""
    path = Path(path)
    try:
        value = parse_json(read_plain(path).decode())
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such quarantine; make it with `fastidc check DATA --quarantine {path}`.") from None
    except (OSError, ValueError) as error:
        raise FastidcError(f"{path}: cannot be read as a quarantine ({getattr(error, 'strerror', None) or error}); {_AGAIN}.") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FastidcError(f"{path}: is no quarantine of fastidc; {_AGAIN}.")
    if value.get("version") != VERSION:
        raise FastidcError(
            f"{path}: is a quarantine of version {value.get('version')!r}, and this fastidc reads version {VERSION}; {_AGAIN}."
        )
    for field, kind in (("dataset", str), ("fingerprint", str), ("pairs", list)):
        if not isinstance(value.get(field), kind):
            raise FastidcError(f"{path}: field {field!r} is missing or not a {kind.__name__}; {_AGAIN}.")
    pairs = dict(_pair(path, index, pair) for index, pair in enumerate(value["pairs"]))
    return Quarantine(path, value["dataset"], value["fingerprint"], pairs)


def all_of(given: "str | Path | Quarantine | Sequence[str | Path | Quarantine] | None") -> list[Quarantine]:
    """What is given as one, several or none of them, read where it is a file; see `read`."""
    several = [] if given is None else [given] if isinstance(given, (str, Path, Quarantine)) else given
    return [one if isinstance(one, Quarantine) else read(one) for one in several]


def _pair(path: Path, index: int, pair: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    try:
        key = pair["id"] if "id" in pair else "\n" + pair["place"]
        reasons = tuple((str(reason["kind"]), str(reason["sentence"])) for reason in pair["reasons"])
        if not isinstance(key, str):
            raise TypeError
    except (TypeError, KeyError):
        raise FastidcError(f"{path}: pairs[{index}] must have an id (or a place) and reasons; {_AGAIN}.") from None
    return key, reasons
