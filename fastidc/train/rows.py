"""Files of JSON lines, one a step: log.jsonl and ledger.jsonl. They only grow, but for a run that goes on from an earlier step."""

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError
from fastidc.files import aside, parse_json, write_text


class Rows:
    """``path`` with the rows of steps up to ``keep`` that it has, open for more. ``last``: the newest of those, at most a hundred.

    What is kept is written aside and renamed, so a kill meanwhile costs nothing. FastidcError where the disk refuses.
    """

    def __init__(self, path: Path, keep: int = 0):
        if not path.is_file():
            write_text(path, "")
        self.path, self.last = path, cut(path, "step", keep)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise self._refused(error) from error

    def flush(self, to_disk: bool = False) -> None:
        """Hands the rows to the system; ``to_disk``: and waits until a loss of power would leave them."""
        try:
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> FastidcError:
        return FastidcError(f"{self.path} cannot be written ({error.strerror or error}); make room, then go on with --resume auto.")


def cut(path: Path, key: str, keep: int) -> deque[dict]:
    """Leaves the rows of ``path`` whose ``key`` is at most ``keep``; the newest of them. A file that is not there stays so."""
    last: deque[dict] = deque(maxlen=100)
    if not path.is_file():
        return last
    with aside(path) as temporary, temporary.open("w", encoding="utf-8") as new, path.open(encoding="utf-8", errors="replace") as old:
        for line in old:
            if (row := _row(line, key)) is not None and row[key] <= keep:
                new.write(line)
                last.append(row)
    return last


def _row(line: str, key: str) -> dict | None:
    """None for a line that a kill cut short."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    whole = line.endswith("\n") and isinstance(row, dict) and isinstance(row.get(key), int)
    return row if whole else None
