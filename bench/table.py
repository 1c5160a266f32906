"""Rows for people and rows for files."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable
from pathlib import Path

from bench.case import OK, Row
from fastidc.files import write_text

COLUMNS = [field.name for field in dataclasses.fields(Row)]


def lines(rows: Iterable[Row]) -> list[str]:
    """One line a row; the caller prints the case above them."""
    return [_line(row) for row in rows]


def _line(row: Row) -> str:
    name = f"  {'*' if row.ours else ' '} {row.variant:<34} {row.mode:<5}"
    if row.status != OK:
        return f"{name} {row.status}: {row.note}"
    parts = []
    if row.ms is not None:
        parts.append(f"{_time(row.ms):>9} ({_time(row.ms_p20)}-{_time(row.ms_p80)})")
    if row.percent_of_floor is not None:
        parts.append(f"{row.percent_of_floor:5.1f}% of floor")
    if row.rate is not None:
        parts.append(f"{row.rate:,.0f} {row.unit}/s")
    if row.ratio is not None:
        parts.append(f"{row.ratio:.2f}x {row.baseline} ({row.ratio_p20:.2f}-{row.ratio_p80:.2f})")
    if row.peak_mb is not None:
        parts.append(f"{row.peak_mb:,.0f} MB beyond {row.resident_mb:,.0f}")
    if row.batch is not None:
        parts.append(f"batch {row.batch}")
    parts.append(f"error {row.error:.1e} of {row.limit:.1e} in {row.worst}" if row.error is not None else "no error known")
    return f"{name} {'  '.join(parts)}{'  ' + row.note if row.note else ''}"


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.2f} ms"


def csv_text(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for k, v in dataclasses.asdict(row).items()})
    return out.getvalue()


def csv_path(first: Row, folder: Path) -> Path:
    """<folder>/<device>/<date>-<family>.csv, or -2, -3 behind it where that is taken: everything is run twice."""
    home = folder / re.sub(r"[^a-z0-9]+", "-", first.device.lower()).strip("-")
    stem = f"{first.date}-{first.family}"
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    return next(home / f"{name}.csv" for name in names if not (home / f"{name}.csv").exists())


def write_csv(rows: list[Row], folder: Path) -> Path:
    """Writes ``rows`` of one family to `csv_path`."""
    return write_text(csv_path(rows[0], folder), csv_text(rows))
