"""Birds-to-Words (data_evaluation.md 1.4): one TSV, and photographs that everyone downloads for themselves."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from fastidc.data.datasets.base import (
    SPLITS,
    Annotations,
    Entry,
    PairRecord,
    Report,
    apply_empty,
    check_unique,
    merged,
    records,
    split_of,
)
from fastidc.data.datasets.files import Files, image_folder
from fastidc.data.datasets.rows import lines_of
from fastidc.errors import FastidcError

TITLE = "Birds-to-Words"
COLUMNS = (
    *(f"img{side}{field}" for side in (1, 2) for field in ("ObservationURL", "ImgURL", "Species", "Selection")),
    "split",
    "annN",
    "description",
)
_MARK = {"img1ImgURL", "img2ImgURL"}


def recognise(root: Path) -> str | None:
    tables = _tables(root)
    return " and ".join(path.name for path in tables) + " with img1ImgURL" if tables else None


def _tables(root: Path) -> list[Path]:
    files = [root] if root.is_file() else [path for base in (root, root / "data") for path in sorted(base.glob("*.tsv"))]
    return [path for path in files if path.suffix.lower() == ".tsv" and _has_mark(path)]


def _has_mark(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _MARK.issubset(cell.strip() for cell in file.readline(4096).split("\t"))
    except (OSError, UnicodeDecodeError):
        return False


def image_name(url: str) -> str:
    """The name, without extension, that the photograph of a URL must have: its number, ".../photos/<number>/..."; else its last part.

    All photographs of iNaturalist are called large.jpg or the like, so that the last part of those URLs would tell none from another.
    """
    number = re.search(r"/photos/(\d+)/", url)
    return number[1] if number else PurePosixPath(unquote(urlsplit(url).path)).stem


def table_of(root: Path) -> Path:
    """The TSV of a folder; FastidcError unless there is one."""
    tables = _tables(root)
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or "none"
        raise FastidcError(
            f"{root}: one .tsv with the columns {', '.join(COLUMNS)} in line 1 was expected, found {found}; name the file itself."
        )
    return tables[0]


def annotations(root: Path) -> Annotations:
    """Entries per split, in the order of the rows; ``root`` is the TSV or its folder. Looks for no image.

    The descriptions of one pair of photographs are its sentences, each a whole paragraph. An entry's id is "{photo 1}-{photo 2}".
    """
    path = table_of(root)
    out: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for where, cells in _lines(path):
        names = []
        for field in ("img1ImgURL", "img2ImgURL"):
            names.append(image_name(cells[field].strip()))
            if not names[-1]:
                raise FastidcError(f"{where}, field {field!r} is {cells[field]!r}; the URL of a photograph was expected.")
        split = split_of(cells["split"].strip(), where)
        out[split].append(Entry("-".join(names), *names, (cells["description"],), where))
    return check_unique({split: merged(entries) for split, entries in out.items()})


def _lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = lines_of(path, file)
            header = [cell.strip() for cell in next(lines)[1]]
            if sorted(header) != sorted(COLUMNS):
                raise FastidcError(f"{path}: line 1 names {', '.join(header)}; the columns of {TITLE} are {', '.join(COLUMNS)}.")
            for line, cells in lines:
                if len(cells) != len(header):
                    raise FastidcError(f"{path}: line {line} has {len(cells)} cells, but line 1 names {len(header)} fields.")
                yield f"{path}: line {line}", dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise FastidcError(f"{path}: cannot be read as UTF-8 text ({error}).") from None


def load(root: Path, images: Path | None, empty: str, report: Report | None) -> dict[str, list[PairRecord]]:
    """Records; a photograph lies in ``images``, or in images/ beside the TSV or beside its folder, as `image_name` with any extension."""
    parsed = apply_empty("birds", annotations(root), empty, report)
    files, base = Files(), table_of(root).parent
    first = next((entry.before for split in SPLITS for entry in parsed[split]), None)
    folder = image_folder(files, images, [base / "images", base.absolute().parent / "images", base], first)
    fields = {"before": "img1ImgURL", "after": "img2ImgURL"}

    def find(entry: Entry, field: str) -> Path:
        name, where = entry.names[field], f"{entry.where}, field {fields[field]!r}"
        path = files.by_stem(folder, name, where)
        if path is None:
            raise FastidcError(
                f"{folder / name}.jpg: image is missing, but {where} names it; save each URL's photograph under the number after /photos/ "
                "in it (failing that, under the URL's own file name), or name the folder of images with --images."
            )
        return path

    return records(parsed, find)
