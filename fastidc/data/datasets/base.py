"""What the readers of all data sets share: the record, the parsed entry, JSON, and the way from one to the other."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fastidc.errors import FastidcError

SPLITS = ("train", "val", "test")
EMPTY = ("drop", "keep")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Report = Callable[[str], None]


@dataclass(frozen=True)
class PairRecord:
    """One scene: two images that differ, the sentences that say how, and maybe a distractor that differs in nothing but the view."""

    id: str  # the image_id of evaluation files; the distractor pair's is `no_change_id`
    before: Path
    after: Path
    captions: tuple[str, ...]
    distractor: Path | None = None
    no_change_captions: tuple[str, ...] = ()
    type: str | None = None  # the kind of change, where the data set says it

    @property
    def no_change_id(self) -> str:
        return f"{self.id}_n"

    @property
    def images(self) -> tuple[Path, ...]:
        """before, after and, where there is one, the distractor."""
        return (self.before, self.after) if self.distractor is None else (self.before, self.after, self.distractor)


@dataclass(frozen=True)
class Entry:
    """A pair as its annotations state it: image names that nobody has looked for yet, and sentences that may be blank."""

    id: str
    before: str
    after: str
    captions: tuple[str, ...]
    where: str  # file and index or line, for sentences about this entry
    distractor: str | None = None
    no_change_captions: tuple[str, ...] = ()
    type: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """field -> image name."""
        names = {"before": self.before, "after": self.after}
        return names if self.distractor is None else names | {"distractor": self.distractor}


Annotations = dict[str, list[Entry]]  # split -> entries


def read_json(path: Path):
    """The parsed file; FastidcError naming it where it is absent or not UTF-8 JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FastidcError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FastidcError(f"{path}: cannot be read as JSON ({error}).") from None


def kind_of(value) -> str:
    """A value's type as sentences name it."""
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def number_or_text(value) -> str | None:
    """An id as text, or None where the value can be none: ids are non-empty strings or integers."""
    if isinstance(value, str) and value.strip():
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def sentences_of(value, where: str, field: str) -> tuple[str, ...]:
    """A non-empty list of strings, blank ones included; FastidcError otherwise."""
    if not isinstance(value, list) or not value:
        raise FastidcError(f"{where}, field {field!r} must be a non-empty list of sentences, got {kind_of(value)}.")
    for index, sentence in enumerate(value):
        if not isinstance(sentence, str):
            raise FastidcError(f"{where}, field {field!r}[{index}] must be a sentence, got {sentence!r}.")
    return tuple(value)


def split_of(value: str, where: str) -> str:
    """train, val or test from any of their usual names; FastidcError otherwise."""
    if value not in SPLIT_NAMES:
        raise FastidcError(f"{where}, field 'split' is {value!r}; one of {', '.join(SPLIT_NAMES)} was expected.")
    return SPLIT_NAMES[value]


def merged(entries: Iterable[Entry]) -> list[Entry]:
    """One entry per id in order of first appearance, the sentences of all its entries one after another."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.id, []).append(entry)
    return [replace(same[0], captions=tuple(text for entry in same for text in entry.captions)) for same in groups.values()]


def check_unique(annotations: Annotations) -> Annotations:
    """``annotations`` themselves; FastidcError where an id stands twice, in one split or in two."""
    seen: dict[str, tuple[str, Entry]] = {}
    for split in SPLITS:
        for entry in annotations[split]:
            if entry.id in seen:
                other, first = seen[entry.id]
                raise FastidcError(
                    f"{entry.where} ({split}): id {entry.id!r} stands already in {first.where} ({other}); keep it in one place."
                )
            seen[entry.id] = (split, entry)
    return annotations


def apply_empty(name: str, annotations: Annotations, empty: str, report: Report | None) -> Annotations:
    """The policy for blank sentences. "drop" leaves them out, and with them pairs that have no other sentence; "keep" changes nothing.

    Either way ``report`` hears the counts of each split that has any.
    """
    out: Annotations = {}
    for split, entries in annotations.items():
        blank = sum(not text.strip() for entry in entries for text in entry.captions)
        out[split] = entries
        if not blank:
            continue
        said = f"{name}: {blank} empty sentence{'s' * (blank != 1)} of {split}"
        if empty == "drop":
            spoken = (replace(entry, captions=tuple(text for text in entry.captions if text.strip())) for entry in entries)
            out[split] = [entry for entry in spoken if entry.captions]
            pairs = len(entries) - len(out[split])
            said += f" left out, and {pairs} pair{'s' * (pairs != 1)} that had no other (--empty keep leaves them in)"
        else:
            said += " kept as empty captions (--empty drop leaves them out)"
        if report is not None:
            report(said + ".")
    return out


def records(annotations: Annotations, find: Callable[[Entry, str], Path]) -> dict[str, list[PairRecord]]:
    """Entries -> records; ``find(entry, field)`` is the file of its image "before", "after" or "distractor", or raises FastidcError."""

    def record(entry: Entry) -> PairRecord:
        before, after, distractor = (find(entry, field) if field in entry.names else None for field in ("before", "after", "distractor"))
        return PairRecord(entry.id, before, after, entry.captions, distractor, entry.no_change_captions, entry.type)

    return {split: [record(entry) for entry in annotations[split]] for split in SPLITS}
