"""`fastidc caption`: one pair, or as many as there are."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastidc.config import penalty_of
from fastidc.errors import FastidcError

_STREAM = "-"


def caption(
    before: str,
    after: str | None = None,
    /,
    *,
    model: str | None = None,
    beams: int = 3,
    length_penalty: float | None = None,
    json: bool = False,
    figure: Path | None = None,
    out: Path | None = None,
    split: Literal["all", "train", "val", "test"] = "all",
    images: Path | None = None,
    batch_size: int = 32,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int | None = None,
) -> int:
    """Say what changed between two images, or in each of many pairs (JSONL rows).

    Example: fastidc caption before.png after.png --model runs/finetune

    Exit codes: 0 all well, 1 some pairs left out, 2 bad input, 130 interrupted.

    Args:
        before: BEFORE, an image; or many pairs: a folder, a .csv or .jsonl table, or - (JSONL).
        after: AFTER, the other image.
        model: Fine-tuned run; else $FASTIDC_MODEL or runs/demo/finetune.
        beams: Captions running at once; 1 is greedy.
        length_penalty: Of beams, 0.7 by default; favours longer ones.
        json: One pair: print a row of JSON.
        figure: One pair: draw it into this file, with attention maps.
        out: Many: write here; rows that are there are kept and gone on after.
        split: Many: the split of a data set.
        images: Many: folder of the images.
        batch_size: Many: pairs at a time.
        device: Where to run.
        workers: Threads that read images.
    """
    how = {"beams": beams, "length_penalty": penalty_of(beams, length_penalty)}
    if after is None and (before == _STREAM or _is_many(Path(before))):
        for flag, value in (("--figure", figure), ("--json", json)):
            if value:
                raise FastidcError(f"{flag} belongs to one pair, BEFORE AFTER; rows of many pairs are JSON anyway.")
        return _many(before, out, split, images, batch_size, workers, how, _maker(model, device, how, tell=True))
    if after is None:
        raise FastidcError(f"{before}: is alone; give BEFORE and AFTER, or a folder, a table or - for many pairs.")
    for flag, value in (("--out", out), ("--images", images), ("--split", None if split == "all" else split)):
        if value is not None:
            raise FastidcError(f"{flag} belongs to many pairs, a folder, a table or -; leave it out for one.")
    return _one(before, after, json, figure, _maker(model, device, how, tell=json))


def say(sentence: str) -> None:
    """A sentence for the user on stderr, above a progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(f"fastidc: {sentence}", file=sys.stderr)


def chosen_model(model: str | None, use: Literal["caption", "search"]) -> str:
    """``model``, or the default, which is said."""
    if model is not None:
        return model
    from fastidc.describe.loading import default_model

    found = default_model(use)
    say(f"no --model is given, so {found} is used.")
    return found


def check_image(path: str | Path) -> None:
    """FastidcError where there is no file to read."""
    if Path(path).is_dir():
        raise FastidcError(f"{path}: is a folder; name an image in it.")
    if not Path(path).is_file():
        raise FastidcError(f"{path}: no such image.")


def _is_many(path: Path) -> bool:
    from fastidc.data.datasets.rows import SUFFIXES

    return path.is_dir() or path.suffix.lower() in SUFFIXES


def _maker(model: str | None, device: str, how: dict[str, Any], tell: bool):
    def make():
        from fastidc.describe import Describer

        describer = Describer(chosen_model(model, "caption"), device, **how)
        if tell and describer.p_change_reason is not None:
            say(f"p_change is left empty: {describer.p_change_reason}.")
        return describer

    return make


def _one(before: str, after: str, json: bool, figure: Path | None, describer) -> int:
    from fastidc.describe import figure as draw
    from fastidc.describe.drawing import check_format
    from fastidc.describe.pairs import Pair
    from fastidc.describe.stream import line_of, row_of

    if figure is not None:
        check_format(figure)
    for path in (before, after):
        check_image(path)
    ready = describer()
    found = ready(before, after)
    if json:
        row = row_of(Pair("", Path(before), Path(after)), found)
        del row["id"]
        print(line_of(row))
    else:
        print(found.caption)
        sys.stdout.flush()
        print(found.said(), file=sys.stderr)
    if figure is not None:
        draw(found, figure, maps=_maps(ready, before, after))
        say(f"wrote {figure}.")
    return 0


def _maps(describer, before: str, after: str):
    """What the model looked at; None, with a sentence, for a model that has no such maps."""
    from fastidc.describe import attention_maps

    try:
        return attention_maps(describer, before, after)
    except FastidcError as error:  # both images were read already
        say(f"the figure is without maps: {error}")
        return None


def _many(
    source: str,
    out: Path | None,
    split: str,
    images: Path | None,
    batch_size: int,
    workers: int | None,
    search: dict[str, Any],
    describer: Callable[[], Any],
) -> int:
    from fastidc.describe.pairs import read_pairs, stream_pairs
    from fastidc.describe.stream import caption_file, caption_stream, made_by

    if batch_size < 1:
        raise FastidcError(f"--batch-size must be at least 1, got {batch_size}.")
    if source == _STREAM:
        if split != "all":
            raise FastidcError("--split belongs to a data set or a table; a stream has no splits.")
        pairs, total = stream_pairs(sys.stdin.buffer, images), None
    else:
        pairs = read_pairs(Path(source), split, images, say)
        total = len(pairs)
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "total": total, "say": say}
    if out is None:
        tally = caption_stream(describer, pairs, _print_row, **how)
        say(f"{tally.said()}.")
        return int(tally.left_out > 0)
    with caption_file(out) as file:
        done, before = len(file.ids), file.left_out
        file.check(search)  # what can be known before a model is read
        rest = file.remaining(pairs)
        if done:
            say(f"{out}: {done:,} rows are there already and are kept.")

        def begun():
            ready = describer()
            file.begin(made_by(ready), say)
            return ready

        try:
            tally = caption_stream(begun, rest, file.add, done=done, **how)
        except KeyboardInterrupt:
            say(f"{out} holds whole rows; the same command goes on after them.")
            raise
    earlier = f" now and {before:,} earlier" if before else ""
    say(f"{tally.said()}{earlier}; wrote {out}.")
    return int(tally.left_out + before > 0)


def _print_row(row: dict[str, Any]) -> None:
    from fastidc.describe.stream import line_of

    print(line_of(row), flush=True)
