"""`fastidc render` and `fastidc cache build|info`."""

import re
import sys
from pathlib import Path
from typing import Literal

from fastidc.errors import FastidcError


def _numbers(text: str, separator: str, flag: str, example: str) -> tuple[int, int]:
    match = re.fullmatch(rf"(\d+)\s*{separator}\s*(\d+)", text.strip())
    if not match:
        raise FastidcError(f"{flag} is {text!r}; write it as in {flag} {example}.")
    return int(match[1]), int(match[2])


def render(
    out: Path,
    scenes: int,
    size: str = "480x320",
    jitter: float = 1.0,
    objects: str = "3-10",
    seed: int = 0,
    references: int = 6,
    workers: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Render a mini CLEVR-Change: images, captions, splits, boxes and scene graphs.

    Example: fastidc render --out data/mini --scenes 1000

    Args:
        out: Folder to make; it must not hold anything yet.
        scenes: Number of scenes, three images each (before, after, distractor).
        size: Pixels, WIDTHxHEIGHT.
        jitter: How far the camera moves between images, in scene units; 1.0 is CLEVR-Change's own.
        objects: Objects a scene, FEWEST-MOST.
        seed: The same seed gives the same bytes, whatever the number of workers.
        references: Sentences a pair.
        workers: Processes; all cores by default.
        device: Where rays are cast; bytes differ between cpu and cuda.
    """
    from fastidc.data.render import RenderConfig, render_dataset

    width, height = _numbers(size, "x", "--size", "480x320")
    fewest, most = _numbers(objects, "-", "--objects", "3-10")
    config = RenderConfig(
        scenes=scenes, width=width, height=height, jitter=jitter, min_objects=fewest, max_objects=most, seed=seed, references=references
    )
    render_dataset(config, out, workers=workers, device=device)
    print(f"wrote {scenes} scenes to {out}")


def cache_build(
    data: Path,
    out: Path | None = None,
    dataset: Literal["auto", "clevr", "spot", "ier", "birds", "table", "folder"] = "auto",
    images: Path | None = None,
    size: int = 224,
    workers: int | None = None,
    builder: Literal["pillow", "dali"] = "pillow",
    quarantine: Path | None = None,
    on_bad_data: str = "raise",
) -> None:
    """Decode and squash every image of a data set once, into one file that
    training maps into memory.

    Example: fastidc cache build --data DATA

    A build that was interrupted goes on where it stopped; of a cache that is there already only what has changed is decoded anew.

    Args:
        data: Folder of a data set, or a .csv, .tsv or .jsonl table of pairs.
        out: The cache; by default fastidc-cache-SIZE.bin in the data folder, where training finds it.
        dataset: What --data holds; auto recognises it.
        images: Folder of the images, where they do not lie beside the annotations.
        size: Pixels a side: the image size of the model that will read them.
        workers: Threads; all cores by default.
        builder: What decodes: Pillow, as the official code does, or NVIDIA DALI; the cache says how far its pixels are from Pillow's.
        quarantine: A file of `fastidc check --quarantine`, whose pairs are left out.
        on_bad_data: Of bad images: raise names all and writes no cache; skip looks at all first and leaves their pairs out; limit:N skips N pairs at most.
    """
    from tqdm import tqdm

    from fastidc.data import bad_data
    from fastidc.data.cache import default_path
    from fastidc.data.cache_build import build
    from fastidc.data.loaders import distinct_images
    from fastidc.data.records import load_records, recognise

    def report(sentence: str) -> None:
        tqdm.write(sentence, file=sys.stderr)

    spares, left = bad_data.most_of(on_bad_data) is not None, None
    kind = recognise(data) if dataset == "auto" else dataset
    out, how = out or default_path(data, size), {"images": images, "empty": "keep", "quarantine": quarantine}
    if spares:
        records, left = bad_data.leave_out(data, kind, on_bad_data, out, workers, **how)
    else:
        records = load_records(data, kind, **how)
    for sentence in [] if left is None else left.named():
        report(sentence)
    built = build(distinct_images(records.values()), data, out, size, workers, builder, kind, report)
    if left is not None:
        print(left.said())
    if not built.decoded:
        print(f"{built.path} is up to date: {built.images:,} images of {size} x {size}")
        return
    rate = built.decoded / max(built.seconds, 1e-9)
    print(
        f"wrote {built.path}: {built.images:,} images of {size} x {size}, {built.path.stat().st_size:,} bytes; "
        f"{built.decoded:,} decoded at {rate:,.0f} images/s"
    )


def cache_info(file: Path, /, verify: bool = False) -> None:
    """What a cache holds; header and index are verified.

    Example: fastidc cache info DATA/fastidc-cache-224.bin --verify

    Args:
        file: FILE, the cache.
        verify: Also compare all pixels with their checksums.
    """
    from fastidc.data.cache import Cache, damaged

    opened = Cache(file)
    bad = opened.damaged_pixels() if verify else []
    if bad:
        more = f" and of {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise damaged(file, f"the pixels of {bad[0]}{more} do not have their checksum")
    print(opened.describe() + ("\npixels:    all have their checksum" if verify else ""))
