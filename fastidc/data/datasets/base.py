"""What the readers of all data sets share: the record, the parsed entry, JSON, and the way from one to the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fastidc.data.datasets.flaws import STRICT, Flaw, Level, Sink, Where
from fastidc.files import parse_json, read_plain

SPLITS = ("train", "val", "test")
EMPTY = ("drop", "keep")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

LARGEST = 1 << 30
"""Bytes of an annotation file. CLEVR-Change's largest has 30 MB; one of this size would take 10 GB of memory."""

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
Find = Callable[[Entry, str], Path]


@dataclass(frozen=True)
class Parsed:
    """A data set's annotations as a reader has parsed them; nobody has looked for an image yet."""

    annotations: Annotations
    files: tuple[Path, ...]  # what was read
    find: Find  # the file of an entry's image "before", "after" or "distractor"; raises Flaw
    fields: Mapping[str, str]  # "before", "after", "distractor" -> the field that names it
    left: Callable[[], Iterator[Flaw]] = lambda: iter(())  # images that no entry names, where the layout forbids them


class Reader(Protocol):
    """A module of this package. ``sink`` hears of every flaw; where it does not raise, the reader leaves out what is flawed and goes on."""

    def recognise(self, root: Path) -> str | None:
        """By which file the layout of ``root`` is known, or None."""

    def parse(self, root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
        """``images``: the folder of images where it is given."""


def read_json(path: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None):
    """The parsed file; FastidcError naming it where it is absent or not UTF-8 JSON. ``hook``: json's object_pairs_hook."""
    try:
        return parse_json(read_plain(path, LARGEST).decode("utf-8-sig"), hook)
    except FileNotFoundError:
        raise Flaw("file", Where(path), "no such file", "put it there", level="fatal") from None
    except (OSError, ValueError) as error:
        fix = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "write it anew"
        raise Flaw("file", Where(path), f"cannot be read as JSON ({reason_of(error)})", fix, level="fatal") from None


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, without the name that its sentence has anyway."""
    return getattr(error, "strerror", None) or str(error)


class Object(dict):
    """An object of a JSON file that knows which of its keys stand ``twice``: JSON forgets their first values. For `read_json`."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        seen: set[str] = set()
        self.twice = tuple(dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key))) if len(self) < len(pairs) else ()

    def flaws(self, where: str, id_: str | None) -> list[Flaw]:
        return [Flaw("duplicate", where, "stands twice", "keep one", field=key, id=id_) for key in self.twice]


def read_object(path: Path, of: str, sink: Sink = STRICT, id_of: Callable[[str], str] = str) -> dict[str, Any]:
    """`read_json` of a file that is one object, ``of`` being what it should be; a key that stands twice, whose first value JSON forgets, is a flaw.

    id_of: key -> the pair that it names.
    """
    twice: dict[str, None] = {}

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice.update(dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key)))
        return table

    table = read_json(path, whole)
    if not isinstance(table, dict):
        raise Flaw("layout", Where(path), f"must be an object of {of}, got {kind_of(table)}", level="fatal")
    for key in twice:
        sink(Flaw("duplicate", Where(path), "stands twice", "keep one", field=key, id=id_of(key)))
    return table


def kind_of(value) -> str:
    """A value's type as sentences name it."""
    return "an empty list" if value == [] else "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"


def number_or_text(value) -> str | None:
    """An id as text, or None where the value can be none: ids are non-empty strings or integers."""
    if isinstance(value, str) and value.strip():
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def sentences_of(value, where: str, field: str, sink: Sink = STRICT, id_: str | None = None, blank: Level = "note") -> tuple[str, ...]:
    """A non-empty list of strings, blank ones included, those of ``value`` that are; Flaw where it is no such list. ``blank``: how bad a sentence of
    nothing but blanks is."""
    if not isinstance(value, list) or not value:
        raise Flaw("captions", where, f"must be a non-empty list of sentences, got {kind_of(value)}", field=field, id=id_)
    for index, sentence in enumerate(value):
        if not isinstance(sentence, str):
            sink(Flaw("captions", where, f"must be a sentence, got {sentence!r}", field=field, at=index, id=id_))
        else:
            say_blank(sentence, where, field, index, sink, id_, blank)
    return tuple(sentence for sentence in value if isinstance(sentence, str))


def say_blank(text: str, where: str, field: str, at: int | None, sink: Sink, id_: str | None, level: Level = "note") -> None:
    """Tells ``sink`` where ``text`` is nothing but blanks."""
    if not text.strip():
        fix = "write one, or leave it to --empty, which leaves it out by default" if level == "note" else "write one"
        sink(Flaw("sentence-empty", where, f"must be a sentence, got {text!r}", fix, field=field, at=at, id=id_, level=level))


def split_of(value: str, where: str) -> str:
    """train, val or test from any of their usual names; Flaw otherwise."""
    if value not in SPLIT_NAMES:
        raise Flaw("split", where, f"is {value!r}", f"one of {', '.join(SPLIT_NAMES)} was expected", field="split")
    return SPLIT_NAMES[value]


def merged(entries: Iterable[Entry]) -> list[Entry]:
    """One entry per id in order of first appearance, the sentences of all its entries one after another."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.id, []).append(entry)
    return [replace(same[0], captions=tuple(text for entry in same for text in entry.captions)) for same in groups.values()]


def check_unique(annotations: Annotations, sink: Sink = STRICT) -> Annotations:
    """``annotations``, of entries with the same id, in one split or in two, the first; the others are flaws."""
    seen: dict[str, tuple[str, Entry]] = {}
    out: Annotations = {}
    for split in SPLITS:
        out[split] = []
        for entry in annotations[split]:
            if entry.id in seen:
                other, first = seen[entry.id]
                what = f"has the id {entry.id!r} in {split}, which stands already in {first.where} ({other})"
                sink(Flaw("duplicate", entry.where, what, "keep it in one place", id=entry.id))
                continue
            seen[entry.id] = (split, entry)
            out[split].append(entry)
    return out


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


def records(annotations: Annotations, find: Find, sink: Sink = STRICT) -> dict[str, list[PairRecord]]:
    """Entries -> records; an entry whose image cannot be found is a flaw, as `Parsed.find` says it."""

    def record(entry: Entry) -> PairRecord:
        before, after, distractor = (find(entry, field) if field in entry.names else None for field in ("before", "after", "distractor"))
        return PairRecord(entry.id, before, after, entry.captions, distractor, entry.no_change_captions, entry.type)

    out: dict[str, list[PairRecord]] = {}
    for split in SPLITS:
        out[split] = []
        for entry in annotations[split]:
            with sink.spare(entry.id):
                out[split].append(record(entry))
    return out
