"""Captions of many pairs as JSONL that can be gone on with: one row a pair, in the order of the pairs."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from fastidc.describe.describer import Describer
from fastidc.describe.loading import digest_of
from fastidc.describe.pairs import BadRow, Pair
from fastidc.errors import FastidcError
from fastidc.files import exclusive, write_json

END = b"\n"
_BREAKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}  # lines to str.splitlines, not to JSON


def row_of(pair: Pair | BadRow, found: Any) -> dict[str, Any]:
    """{"id", "before", "after", "caption", "log_prob", "p_change"} of a description, {"id", "error"} of a FastidcError."""
    if isinstance(found, FastidcError):
        return {"id": pair.id, "error": str(found)}
    return {"id": pair.id, "before": str(pair.before), "after": str(pair.after), **found.facts()}


def line_of(row: dict[str, Any]) -> str:
    """One line of JSON, without its end, to whoever splits lines; names that are no Unicode are escaped."""
    text = json.dumps(row, ensure_ascii=False).translate(_BREAKS)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def made_by(describer: Describer) -> dict[str, Any]:
    """What a caption depends on beside its images; rows of one file agree in it. "source" is for a reader, the weights are compared."""
    model = describer.ready.model
    shape = {name: value for name, value in model.config.to_dict().items() if name != "dropout"}
    how = {"beams": describer.beams, "length_penalty": describer.length_penalty, "max_words": describer.ready.max_words}
    return {"model": digest_of(json.dumps(shape, sort_keys=True), model), "source": describer.ready.source, **how}


class CaptionFile:
    """A JSONL file of captions that grows by whole lines. What a killed run left of its last line is cut off by the first row that follows.

    ids, left_out: the rows that are there already, and how many of them are errors. What made them is in .NAME.meta.json beside it.
    FastidcError for a file of something else.
    """

    def __init__(self, path: Path):
        self.path, self.ids, self.left_out = path, [], 0
        self.meta = path.with_name(f".{path.name}.meta.json")
        self._images: list[tuple[Any, Any]] = []  # of each row, None where it is an error
        self._whole = 0  # bytes of complete lines
        self._file: IO[bytes] | None = None
        if path.is_dir():
            raise FastidcError(f"{path}: a folder; --out names a file.")
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.endswith(END):
                        self._take(number, line)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise FastidcError(f"{path}: cannot be read ({error.strerror or error}); choose another --out.") from None

    def _take(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not ("caption" in row or "error" in row):
            raise FastidcError(f"{self.path}: line {number} is no row of captions (id and caption); choose another --out.")
        self.ids.append(row["id"])
        self._images.append((row.get("before"), row.get("after")))
        self.left_out += "error" in row
        self._whole += len(line)

    def remaining(self, pairs: Iterable[Pair | BadRow]) -> Iterator[Pair | BadRow]:
        """``pairs`` after those that the file has; FastidcError where the file's rows are not the first of ``pairs``. It asks for as many."""
        pairs = iter(pairs)
        for number, (own, images) in enumerate(zip(self.ids, self._images, strict=True), 1):
            pair = next(pairs, None)
            if pair is None or pair.id != own:
                there = "the input ends before it" if pair is None else f"the input has {pair.id!r} there"
                raise FastidcError(f"{self.path}: line {number} is of {own!r}, but {there}; choose another --out, or delete this file.")
            for field, there in zip(("before", "after"), images, strict=True):
                if there is None:
                    continue
                now = str(getattr(pair, field, "a row that cannot be read"))
                if not isinstance(there, str) or os.path.abspath(there) != os.path.abspath(now):
                    raise FastidcError(
                        f"{self.path}: line {number}, {own!r}, has {field} {there}, but the input has {now} there; choose another --out, or "
                        "delete this file."
                    )
        return pairs

    def check(self, now: dict[str, Any]) -> bool:
        """FastidcError where the rows that are there were made otherwise than by ``now``, some of `made_by`; False where nothing says how."""
        if not self.ids:
            return True
        try:
            then = json.loads(self.meta.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(then, dict):
            return False
        for field in ("model", "beams", "length_penalty", "max_words"):
            if field in now and then.get(field) != now[field]:
                raise FastidcError(
                    f"{self.path}: its rows were made with {field} {_shown(then, field)}, and {field} is {_shown(now, field)} now; "
                    f"delete {self.path}, or give the same flags."
                )
        return True

    def begin(self, now: dict[str, Any], say: Callable[[str], None]) -> None:
        """`check` of a whole `made_by`, which is kept for the next run where it is not yet."""
        known = self.check(now)
        if not known:
            say(f"{self.path}: nothing tells which model and flags made the rows that are there ({self.meta.name}); those of now follow.")
        if not known or not self.ids:
            write_json(self.meta, now)

    def add(self, row: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
                self._file.truncate(self._whole)
            self._file.write(line_of(row).encode() + END)
            self._file.flush()  # a row is on its way to the disk before the next is made
        except OSError as error:
            raise FastidcError(
                f"{self.path}: cannot be written ({error.strerror or error}); make room and run this again, it goes on."
            ) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _shown(how: dict[str, Any], field: str) -> str:
    if field == "model":
        return f"{how.get('source')} (weights {str(how.get('model'))[:8]})"
    return str(how.get(field))


@contextmanager
def caption_file(path: Path) -> Iterator[CaptionFile]:
    """`CaptionFile`, for one process at a time."""
    with exclusive(path.with_name(f".{path.name}.lock"), str(path)):
        file = CaptionFile(path)
        try:
            yield file
        finally:
            file.close()


@dataclass
class Tally:
    """What became of a run's pairs."""

    captioned: int = 0
    left_out: int = 0
    seconds: float = 0.0

    def said(self) -> str:
        """ "captioned 97 pairs (41.2 a second), 3 left out" """
        count = f"captioned {self.captioned:,} pair{'s' * (self.captioned != 1)}"
        return f"{count} ({self.captioned / max(self.seconds, 1e-9):,.1f} a second), {self.left_out:,} left out"


def caption_stream(
    describer: Callable[[], Describer],
    pairs: Iterable[Pair | BadRow],
    write: Callable[[dict[str, Any]], None],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    total: int | None = None,
    done: int = 0,
    say: Callable[[str], None] | None = None,
) -> Tally:
    """A row for each of ``pairs``, given to ``write`` in their order and as it is there, under a progress bar on stderr.

    describer: makes the model, and is not asked where there are no pairs. total, done: of all pairs and before this run, for the bar. say:
    hears a sentence for each pair that is left out.
    """
    from tqdm import tqdm

    tally, waiting, pairs = Tally(), deque(), iter(pairs)
    first = next(pairs, None)
    if first is None:
        return tally
    ready = describer()

    def noted() -> Iterator[tuple[os.PathLike, os.PathLike]]:
        for pair in chain([first], pairs):
            waiting.append(pair)
            if isinstance(pair, Pair):
                yield pair.before, pair.after

    def put(pair: Pair | BadRow, found: Any) -> None:
        write(row_of(pair, found))
        if isinstance(found, FastidcError):
            tally.left_out += 1
            if say is not None:
                say(f"{pair.id} is left out: {found}")
        else:
            tally.captioned += 1
        bar.update()

    def put_bad_rows() -> None:
        while waiting and isinstance(waiting[0], BadRow):
            put(row := waiting.popleft(), row.error)

    began = time.perf_counter()
    try:
        with tqdm(total=total, initial=done, desc="caption", unit="pair", file=sys.stderr) as bar:
            for found in ready.many(noted(), batch_size, errors="return", workers=workers):
                put_bad_rows()
                put(waiting.popleft(), found)
            put_bad_rows()
    finally:
        tally.seconds = time.perf_counter() - began
    return tally
