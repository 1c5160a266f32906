"""METEOR's table of paraphrases, without the entries that no sentence at hand can match.

The jar reads all 5.3 million in ten seconds, and a data set's sentences can match a few thousand. An entry is three lines: a probability and two
phrases, one of which has to stand in a caption and the other in a reference. So whatever is left out here changes no alignment.
"""

import gzip
import hashlib
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_RUN = re.compile(r"[^\W_]+")
_BLOCK = 1 << 22
_KEPT = 30  # tables in the cache
_LONGEST = 100  # letters of a word; no entry has one
_FORMAT = b"1"
# what is neither a letter nor a digit parts words
_RUNS = bytes(ord(chr(byte).lower()) if byte < 0x80 and chr(byte).isalnum() else ord(" ") for byte in range(256))


class StoppedError(Exception):
    """Nobody waits for the table any more."""


def words_of(sentences: Iterable[str]) -> frozenset[str]:
    """Every word that METEOR may make of ``sentences``: it takes tokens apart at some marks and drops others ("u.s." becomes "us"), so these are the
    runs of letters and digits of each token, and what follows each other of them put together. Lower case."""
    words: set[str] = set()
    for token in set(" ".join(set(sentences)).lower().split()):
        runs = _RUN.findall(token)
        for first in range(len(runs)):
            word = ""
            for run in runs[first:]:
                word += run
                words.add(word)
                if len(word) > _LONGEST:
                    break
    return frozenset(words)


def table_for(words: frozenset[str], table: Path, stop: threading.Event | None = None) -> Path:
    """A file with the entries of ``table`` (gzip) whose words are all among ``words``; made once, and kept in the user's cache. ``table`` itself where it
    cannot be made. StoppedError soon after ``stop`` is set."""
    try:
        size = table.stat().st_size
        name = hashlib.sha256(
            b"\n".join([_FORMAT, str(size).encode(), *sorted(word.encode("utf-8", "replace") for word in words)])
        ).hexdigest()
        folder = _folder()
        path = folder / f"{name[:32]}.gz"
        if path.is_file():
            os.utime(path)
            return path
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{name[:8]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            _write(table, aside, words, stop or threading.Event())
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)
        _prune(folder)
        return path
    except OSError:  # a cache that cannot be written, a table that is damaged
        return table


def _write(table: Path, out: Path, words: frozenset[str], stop: threading.Event) -> None:
    """In a process of its own: for seconds it would hold the interpreter, and scores are counted meanwhile."""
    command = [sys.executable, "-I", __file__, str(table), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            process.stdin.write("\n".join(word for word in words if word.isascii()).encode())
            process.stdin.close()
            while process.poll() is None:
                if stop.wait(0.02):
                    raise StoppedError
        finally:
            process.kill()
    if process.returncode:
        raise OSError(f"the table of paraphrases was not made (exit code {process.returncode})")


def _kept(table: str, words: frozenset[bytes]) -> Iterator[bytes]:
    """Of phrases with letters beyond ASCII nothing is known, and they are kept."""
    rest, phrase, known = b"", None, False

    def are_known(text: bytes) -> bool:
        return words.issuperset(text.translate(_RUNS).split()) or not text.isascii()

    with gzip.open(table) as file:
        while block := file.read(_BLOCK):
            lines = (rest + block).split(b"\n")
            end = (len(lines) - 1) // 3 * 3
            rest = b"\n".join(lines[end:])
            for probability, one, other in zip(lines[0:end:3], lines[1:end:3], lines[2:end:3], strict=True):
                if one != phrase:  # which many entries have in a row
                    known = are_known(one)
                    phrase = one
                if known and are_known(other):
                    yield b"\n".join((probability, one, other, b""))


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastidc" / "meteor"


def _prune(folder: Path) -> None:
    """Leaves the tables that were used last."""
    with suppress(OSError):
        tables = sorted(folder.glob("*.gz"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in tables[_KEPT:]:
            path.unlink(missing_ok=True)


if __name__ == "__main__":  # words on the standard input, see `_write`
    known = frozenset(sys.stdin.buffer.read().split())
    with gzip.open(sys.argv[2], "wb", compresslevel=1) as written:
        written.writelines(_kept(sys.argv[1], known))
