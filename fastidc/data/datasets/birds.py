"""Birds-to-Words (data_evaluation.md 1.4): one TSV, and photographs that everyone downloads for themselves."""

import re
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from fastidc.data.datasets.base import (
    LARGEST,
    SPLITS,
    Annotations,
    Entry,
    Parsed,
    Report,
    check_unique,
    merged,
    reason_of,
    say_blank,
    split_of,
)
from fastidc.data.datasets.files import Files, image_folder, name_flaw
from fastidc.data.datasets.flaws import STRICT, Flaw, Sink, Where
from fastidc.data.datasets.rows import lines_of
from fastidc.errors import FastidcError
from fastidc.files import open_plain

TITLE = "Birds-to-Words"
COLUMNS = (
    *(f"img{side}{field}" for side in (1, 2) for field in ("ObservationURL", "ImgURL", "Species", "Selection")),
    "split",
    "annN",
    "description",
)
_MARK = {"img1ImgURL", "img2ImgURL"}
_IMAGES = {"before": "img1ImgURL", "after": "img2ImgURL"}


def recognise(root: Path) -> str | None:
    tables = _tables(root)
    return " and ".join(path.name for path in tables) + " with img1ImgURL" if tables else None


def _tables(root: Path) -> list[Path]:
    files = [root] if root.is_file() else [path for base in (root, root / "data") for path in sorted(base.glob("*.tsv"))]
    return [path for path in files if path.suffix.lower() == ".tsv" and _has_mark(path)]


def _has_mark(path: Path) -> bool:
    try:
        with TextIOWrapper(open_plain(path), encoding="utf-8-sig") as file:
            return _MARK.issubset(cell.strip() for cell in file.readline(4096).split("\t"))
    except (OSError, UnicodeDecodeError):
        return False


def image_name(url: str) -> str:
    """The name, without extension, that the photograph of a URL must have: its number, ".../photos/<number>/..."; else its last part.

    All photographs of iNaturalist are called large.jpg or the like, so that the last part of those URLs would tell none from another.
    """
    number = re.search(r"/photos/(\d+)/", url)
    try:
        return number[1] if number else PurePosixPath(unquote(urlsplit(url).path)).stem
    except ValueError:  # "http://[" is no URL
        return ""


def table_of(root: Path) -> Path:
    """The TSV of a folder; FastidcError unless there is one."""
    tables = _tables(root)
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or "none"
        raise FastidcError(
            f"{root}: one .tsv with the columns {', '.join(COLUMNS)} in line 1 was expected, found {found}; name the file itself."
        )
    return tables[0]


def annotations(root: Path, sink: Sink = STRICT) -> Annotations:
    """Entries per split, in the order of the rows; ``root`` is the TSV or its folder. Looks for no image.

    The descriptions of one pair of photographs are its sentences, each a whole paragraph. An entry's id is "{photo 1}-{photo 2}".
    """
    out: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    with sink.spare():
        for where, cells in _lines(table_of(root), sink):
            names = [image_name(cells[field].strip()) for field in _IMAGES.values()]
            for name, field in zip(names, _IMAGES.values(), strict=True):
                if not name:
                    sink(Flaw("image-name", where, f"is {cells[field]!r}", "the URL of a photograph was expected", field=field))
                elif flaw := name_flaw(name, where, field):
                    sink(flaw)
            if all(names) and not any(name_flaw(name, where) for name in names):
                with sink.spare("-".join(names)):
                    split = split_of(cells["split"].strip(), where)
                    say_blank(cells["description"], where, "description", None, sink, "-".join(names))
                    out[split].append(Entry("-".join(names), *names, (cells["description"],), where))
    return check_unique({split: merged(entries) for split, entries in out.items()}, sink)


def _lines(path: Path, sink: Sink) -> Iterator[tuple[Where, dict[str, str]]]:
    try:
        with TextIOWrapper(open_plain(path, LARGEST), encoding="utf-8-sig", newline="") as file:
            lines = lines_of(path, file)
            header = [cell.strip() for cell in next(lines)[1]]
            if sorted(header) != sorted(COLUMNS):
                what = f"names {', '.join(header)}; the columns of {TITLE} are {', '.join(COLUMNS)}"
                raise Flaw("field-unknown", Where(path, "line 1"), what, level="fatal")
            for line, cells in lines:
                where = Where(path, f"line {line}")
                if len(cells) != len(header):
                    what = f"has {len(cells)} cells, but line 1 names {len(header)} fields"
                    sink(Flaw("cells", where, what, "see to its tabs"))
                    continue
                yield where, dict(zip(header, cells, strict=True))
    except (OSError, UnicodeDecodeError) as error:
        raise Flaw("file", Where(path), f"cannot be read as UTF-8 text ({reason_of(error)})", "save it as UTF-8", level="fatal") from None


def parse(root: Path, images: Path | None, report: Report | None, sink: Sink) -> Parsed:
    """A photograph lies in ``images``, or in images/ beside the TSV or beside its folder, as `image_name` with any extension."""
    parsed, table = annotations(root, sink), table_of(root)
    files, base = Files(), table.parent
    first = next((entry.before for split in SPLITS for entry in parsed[split]), None)
    folder = image_folder(files, images, [base / "images", base.absolute().parent / "images", base], first)
    fix = (
        "save each URL's photograph under the number after /photos/ in it (failing that, under the URL's own file name), or name the folder "
        "of images with --images"
    )

    def find(entry: Entry, field: str) -> Path:
        name = entry.names[field]
        path = files.by_stem(folder, name, entry.where, _IMAGES[field])
        if path is None:
            raise files.missing(folder / name, entry.where, fix, _IMAGES[field], ".jpg")
        return path

    return Parsed(parsed, (table,), find, _IMAGES)
