"""`fastidc check`."""

import sys
from pathlib import Path
from typing import Literal


def check(
    data: Path,
    /,
    dataset: Literal["auto", "clevr", "spot", "ier", "birds", "table", "folder"] = "auto",
    images: Path | None = None,
    decode: bool = True,
    quick: bool = False,
    max_words: int = 32,
    limit: int = 500,
    json: Path | None = None,
    quarantine: Path | None = None,
    workers: int | None = None,
) -> int:
    """Everything that is wrong with a data set, in one table.

    Exit code: 0 every pair can be used, 1 some are bad, 2 it cannot be read.

    Example: fastidc check data/spot --quarantine bad.json

    Args:
        data: DATA, a folder, or a .csv, .tsv or .jsonl table.
        dataset: What DATA holds.
        images: Folder of images, where not beside DATA.
        decode: Decode every image; --no-decode opens none.
        quick: Look at both ends of image files only.
        max_words: Tokens beyond which captions are cut off.
        limit: Rows to print; 0 prints all.
        json: Write everything here.
        quarantine: Write the bad pairs here; training leaves them out.
        workers: Threads; all cores by default.
    """
    from json import dumps

    from fastidc.data.check import check as look
    from fastidc.data.check_report import summary, table
    from fastidc.errors import FastidcError
    from fastidc.files import write_text

    if quick and not decode:
        raise FastidcError("--quick looks at the ends of images and --no-decode at none; leave one of them out.")
    if limit < 0:
        raise FastidcError(f"--limit must be at least 0, got {limit}.")
    how = "ends" if quick else "full" if decode else "none"
    found = look(data, dataset, images, how, max_words, workers, progress=sys.stderr.isatty())
    for notice in found.notices:
        print(notice)
    if rows := table(found.problems, limit):
        print(f"{rows}\n")
    print(summary(found))
    if json is not None:
        print(f"wrote {write_text(json, dumps(found.as_json(), indent=2) + chr(10))}")
    if quarantine is not None:
        pairs = len(found.bad_pairs())
        print(f"wrote {found.write_quarantine(quarantine)}: {pairs:,} pair{'s' * (pairs != 1)}")
    return found.code
