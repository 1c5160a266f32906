"""What is wrong in a data set, as an error with parts, and who hears of it: the one who raises, or one who writes it down and reads on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fastidc.errors import FastidcError

Level = Literal["fatal", "bad", "note"]
LEVELS: tuple[Level, ...] = ("fatal", "bad", "note")
"""fatal: the data set cannot be read until it is mended. bad: a pair is unusable. note: worth knowing, and no reader minds."""


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST = 300  # signs of a part of a sentence


def printed(text: str) -> str:
    """``text`` as a sentence may hold it: neither endless nor able to move a terminal's cursor."""
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 40]} ... {text[-30:]}"
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class Where(str):
    """A place in a file, as sentences name it: "FILE" or "FILE: PLACE"."""

    file: Path
    place: str

    def __new__(cls, file: Path, place: str = "") -> "Where":
        self = super().__new__(cls, f"{file}: {place}" if place else str(file))
        self.file, self.place = file, place
        return self


class Flaw(FastidcError):  # noqa: N818 - kept and counted more often than raised
    """One thing that is wrong: ``what`` follows the place (or the image) in the sentence, ``fix`` is the way out.

    kind: a word to count by. field, at: the field of the annotations, and the place in its list. id: the pair that suffers, where it is known.
    image: the file that ``what`` is about; the place is then where it is named.
    """

    def __init__(
        self,
        kind: str,
        where: str,
        what: str,
        fix: str = "",
        *,
        field: str | None = None,
        at: int | None = None,
        id: str | None = None,
        level: Level = "bad",
        image: Path | None = None,
    ):
        self.kind, self.where, self.what, self.fix, self.id, self.level, self.image = kind, where, what, fix, id, level, image
        index = "" if at is None else f"[{at}]"
        self.field = "" if field is None else f"{field}{index}"
        said = printed(where) if field is None else f"{printed(where)}, field {printed(repr(field))}{index}"
        of_file = field is None and isinstance(where, Where) and not where.place
        what, fix = printed(what), printed(fix)
        said = f"{said}{':' if of_file else ''} {what}" if image is None else f"{printed(str(image))}: {what}, but {said} names it"
        super().__init__(f"{said}; {fix}." if fix else f"{said}.")

    @property
    def place(self) -> tuple[str, str]:
        """(file, place in it), either of which may be empty."""
        return (str(self.where.file), self.where.place) if isinstance(self.where, Where) else (str(self.where), "")

    @property
    def key(self) -> str:
        """What a quarantine knows it by: the pair's id, or failing that its place."""
        return key_of(self.id, self.where)


def key_of(id_: str | None, where: str) -> str:
    """The pair's id, or, with a sign that no id begins with, the name of the file and the place in it: a data set may be moved."""
    if id_ is not None:
        return id_
    return f"\n{where.file.name}: {where.place}" if isinstance(where, Where) else f"\n{where}"


class Sink:
    """Hears of flaws. This one raises the first that is more than a note; a `Collector` keeps them all."""

    def __call__(self, flaw: Flaw) -> None:
        if flaw.level != "note":
            raise flaw

    @contextmanager
    def spare(self, id_: str | None = None) -> Iterator[None]:
        """What comes after the block goes on where the block is left by a flaw, unless this sink raises. ``id_``: the pair in question."""
        try:
            yield
        except Flaw as flaw:
            flaw.id = id_ if flaw.id is None else flaw.id
            self(flaw)


class Collector(Sink):
    """Keeps every flaw in ``found``, in the order of the files."""

    def __init__(self) -> None:
        self.found: list[Flaw] = []

    def __call__(self, flaw: Flaw) -> None:
        self.found.append(flaw)


STRICT = Sink()
