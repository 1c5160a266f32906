"""Everything that is wrong with a data set, at once: `fastidc check`.

The readers say what they would refuse, to a `Collector`, and go on; what no reader minds is looked for here and in `check_captions`; images
are looked at by `check_images` with the loader's own functions.
"""

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastidc.data import quarantine
from fastidc.data.cache import folder_of
from fastidc.data.check_captions import check_captions, check_splits
from fastidc.data.check_images import Look, Seen, look_at_all, same_bytes
from fastidc.data.datasets.base import SPLITS, Entry, Parsed
from fastidc.data.datasets.flaws import LEVELS, Collector, Flaw, Level, Where, key_of
from fastidc.data.records import parse
from fastidc.errors import FastidcError

# Of sentences that say that nothing has changed, in whatever words.
_UNCHANGED = re.compile(r"\b(no|not|nothing|none|same|identical|unchanged|without|seem|remains?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """A row of the table."""

    level: Level
    kind: str
    file: str  # from the data set's folder on
    place: str  # index or line in it, as sentences name it; empty where it is about the whole file
    field: str
    what: str  # a clause; of an image it begins with its path
    fix: str
    ids: tuple[str, ...]  # the pairs that suffer, where they have ids
    keys: tuple[str, ...]  # what a quarantine knows them by


@dataclass
class Findings:
    """What `check` has found. ``facts``: counts for the eye and for --json."""

    root: Path
    dataset: str
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)  # what the reader has to say
    fingerprint: str = ""

    def count(self, level: Level) -> Counter[str]:
        """kind -> how often, of the problems of a level."""
        return Counter(problem.kind for problem in self.problems if problem.level == level)

    @property
    def code(self) -> int:
        """The exit code: 0 every pair can be used, 1 some are bad, 2 the data set cannot be read until it is mended."""
        return 2 if self.count("fatal") else 1 if self.count("bad") else 0

    def bad_pairs(self) -> dict[str, list[tuple[str, str]]]:
        """key -> (kind, sentence) of why, as a quarantine holds it."""
        pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for problem in self.problems:
            if problem.level == "bad":
                where = " ".join(part for part in (f"{problem.file}:", problem.place, problem.field) if part)
                for key in problem.keys:
                    pairs[key].append((problem.kind, f"{where} {problem.what}"))
        return pairs

    def write_quarantine(self, path: Path) -> Path:
        """FastidcError where the data set cannot be read anyway, or the file cannot be written."""
        if self.count("fatal"):
            raise FastidcError(f"{self.root}: cannot be read, whatever is left out; mend what is fatal first, {path} is not written.")
        return quarantine.write(path, self.dataset, self.root, self.fingerprint, self.bad_pairs())

    def as_json(self) -> dict[str, Any]:
        """What --json writes. Names and sentences may hold half characters, which only escaped JSON can say."""
        counts = {level: dict(self.count(level).most_common()) for level in LEVELS}
        rows = [{key: value for key, value in asdict(problem).items() if key != "keys"} for problem in self.problems]
        head = {"data": str(self.root), "dataset": self.dataset, "exit_code": self.code, "bad_pairs": len(self.bad_pairs())}
        return head | {"counts": counts, "problems": rows, "facts": self.facts, "notices": self.notices}


def check(
    root: str | Path,
    dataset: str = "auto",
    images: str | Path | None = None,
    how: Look = "full",
    max_words: int = 32,
    workers: int | None = None,
    progress: bool = True,
) -> Findings:
    """Looks at everything of a data set; the first four arguments are those of `fastidc.data.records.load_records`.

    how: "full" decodes every image, once; "ends" reads both ends of its file; "none" opens none. max_words: tokens of a sentence, start and
    end included, beyond which it is cut off. workers: threads; by default one a core.

    FastidcError where there is no data set, or one whose kind cannot be told.
    """
    root, started = Path(root), time.perf_counter()
    if max_words < 3:
        raise FastidcError(f"--max-words must be at least 3 (start, a word, end), got {max_words}.")
    if workers is not None and workers < 1:
        raise FastidcError(f"--workers must be at least 1, got {workers}.")
    sink, found = Collector(), Findings(root, dataset)
    rows = _Rows(folder_of(root), found.problems)
    try:
        found.dataset, parsed = parse(root, dataset, images, found.notices.append, sink)
        found.fingerprint = quarantine.fingerprint_of(parsed.files)
        uses = _uses(parsed, sink)
        for flaw in parsed.left():
            sink(flaw)
        facts = check_captions(parsed.annotations, max_words, sink, progress)
        shared = {split: [path for path, users in uses.items() if any(user[0] == split for user in users)] for split in SPLITS}
        if not any(flaw.level == "fatal" for flaw in sink.found):  # of splits that could not be read nothing is known
            check_splits(parsed.annotations, shared, Where(root), sink)
    except Flaw as fatal:  # before anything could be parsed
        fatal.level = "fatal"
        sink(fatal)
        parsed, uses, facts = None, {}, {}
    for flaw in sink.found:
        rows.add(flaw)
    seen = look_at_all(uses, how, workers, progress) if how != "none" else {}
    for path, verdict in seen.items():
        if verdict.kind:
            rows.add_image(path, verdict, uses[path], parsed.fields)
    if parsed is not None and seen:
        for flaw in _pairs(parsed, uses, seen):
            rows.add(flaw)
        facts["images"] = _image_facts(seen)
    found.problems.sort(key=lambda problem: LEVELS.index(problem.level))
    found.facts = facts | {"looked_at": how, "seconds": round(time.perf_counter() - started, 2)}
    return found


_Uses = dict[Path, list[tuple[str, Entry, str]]]  # image -> (split, entry, "before", "after" or "distractor")


def _uses(parsed: Parsed, sink: Collector) -> _Uses:
    uses: _Uses = defaultdict(list)
    for split in SPLITS:
        for entry in parsed.annotations[split]:
            for name in entry.names:
                with sink.spare(entry.id):
                    uses[parsed.find(entry, name)].append((split, entry, name))
    return uses


def _pairs(parsed: Parsed, uses: _Uses, seen: dict[Path, Seen]) -> Iterable[Flaw]:
    """What is odd about the images of a pair next to each other."""
    found: dict[int, dict[str, Path]] = defaultdict(dict)
    for path, users in uses.items():
        for _, entry, name in users:
            found[id(entry)][name] = path
    for split in SPLITS:
        for entry in parsed.annotations[split]:
            paths = found[id(entry)]
            for other in ("after", "distractor"):
                first, second = (seen.get(paths.get(name)) for name in ("before", other))
                if first and second and first.size and second.size and first.size != second.size:
                    one, two = (f"{width} x {height}" for width, height in (first.size, second.size))
                    what = f"has a before-image of {one} and {'an' if other == 'after' else 'a'} {other}-image of {two}"
                    fix = "both are squashed to a square: see whether that is meant"
                    yield Flaw("size-differs", entry.where, what, fix, id=entry.id, level="note")
            if "after" not in paths or all(_UNCHANGED.search(text) for text in entry.captions):
                continue
            for other in ("before", "distractor"):
                if other in paths and same_bytes(paths[other], paths["after"], seen):
                    what = f"has the same {other}- and after-image, byte for byte, though its sentences tell of a change"
                    yield Flaw("pair-same", entry.where, what, "replace one of them", id=entry.id)


def _image_facts(seen: dict[Path, Seen]) -> dict[str, Any]:
    sizes = Counter(f"{one.size[0]}x{one.size[1]}" for one in seen.values() if one.size)
    modes, formats = (Counter(getattr(one, name) for one in seen.values() if one.size) for name in ("mode", "format"))
    out: dict[str, Any] = {"files": len(seen), "bytes": sum(one.bytes for one in seen.values())}
    return out | {"sizes": dict(sizes.most_common()), "modes": dict(modes.most_common()), "formats": dict(formats.most_common())}


class _Rows:
    """Flaws as rows of the table: names from the data set's folder on."""

    def __init__(self, folder: Path, problems: list[Problem]):
        self.folder, self.problems = str(folder), problems
        self.prefix = self.folder.rstrip(os.sep) + os.sep

    def _short(self, text: str) -> str:
        return "." if text == self.folder else text.replace(self.prefix, "")

    def add(self, flaw: Flaw) -> None:
        file, place = flaw.place
        what = flaw.what if flaw.image is None else f"{flaw.image}: {flaw.what}"
        ids = () if flaw.id is None else (flaw.id,)
        keys = (flaw.key,) if flaw.level == "bad" else ()
        row = Problem(flaw.level, flaw.kind, self._short(file), place, flaw.field, self._short(what), self._short(flaw.fix), ids, keys)
        self.problems.append(row)

    def add_image(self, path: Path, seen: Seen, users: list[tuple[str, Entry, str]], fields: Any) -> None:
        """An image is one row, however many pairs have it."""
        _, entry, name = users[0]
        ids = tuple(dict.fromkeys(user.id for _, user, _ in users))
        where = entry.where
        file, place = (str(where.file), where.place) if isinstance(where, Where) else (str(where), "")
        what = f"{path}: {seen.what}" + (f" (in {len(ids)} pairs)" if len(ids) > 1 else "")
        keys = tuple(key_of(id_, where) for id_ in ids) if seen.level == "bad" else ()
        row = Problem(seen.level, seen.kind, self._short(file), place, fields[name] or name, self._short(what), seen.fix, ids, keys)
        self.problems.append(row)
