"""The command line: `fastidc render|cache|adapt|finetune|convert|demo|doctor`."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from fastidc.config import TrainOptions
from fastidc.errors import FastidcError, LostPeerError


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
    builder: Literal["pillow"] = "pillow",
) -> None:
    """Decode and squash every image of a data set once, into one file that training maps into memory.

    A build that was interrupted goes on where it stopped; of a cache that is there already only what has changed is decoded anew.

    Args:
        data: Folder of a data set, or a .csv, .tsv or .jsonl table of pairs.
        out: The cache; by default fastidc-cache-SIZE.bin in the data folder, where training finds it.
        dataset: What --data holds; auto recognises it.
        images: Folder of the images, where they do not lie beside the annotations.
        size: Pixels a side: the image size of the model that will read them.
        workers: Threads; all cores by default.
        builder: What decodes.
    """
    from tqdm import tqdm

    from fastidc.data.cache import default_path
    from fastidc.data.cache_build import build
    from fastidc.data.loaders import distinct_images
    from fastidc.data.records import load_records, recognise

    def report(sentence: str) -> None:
        tqdm.write(sentence, file=sys.stderr)

    kind = recognise(data) if dataset == "auto" else dataset
    paths = distinct_images(load_records(data, kind, images=images, empty="keep").values())
    built = build(paths, data, out or default_path(data, size), size, workers, builder, kind, report)
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


def _stage(stage, options: TrainOptions) -> None:
    from fastidc.evaluate import paper
    from fastidc.evaluate.report import format_table
    from fastidc.train.distributed import is_main_process
    from fastidc.train.run import train

    metrics = train(stage, options)
    if not is_main_process():
        return
    test = metrics["splits"].get("test")
    if test is not None and stage == "adapt":
        print(paper.retrieval_table(metrics["dataset"], {"strict": test, "legacy": metrics["legacy_ties"]["test"]}))
    elif test is not None:
        print(format_table(test))
        if metrics["dataset"] in paper.PAPER:
            print("\n" + paper.caption_table(metrics["dataset"], test))
    if stage == "finetune" and test is not None:
        print(f"captions of the test split: {options.out / 'hyp_test.json'}")
    print(f"wrote {options.out}")


def adapt(options: TrainOptions) -> None:
    """Adaptation: align image pairs with their captions (symmetric InfoNCE), then score retrieval on the test split."""
    _stage("adapt", options)


def finetune(options: TrainOptions) -> None:
    """Fine-tuning: train the captioner, caption the test split and score it. --init takes the adapted run."""
    _stage("finetune", options)


def convert(
    src: str,
    dst: str,
    /,
    layout: Literal["fastidc", "official", "openai"] | None = None,
    intra_layers: int | None = None,
    dtype: Literal["keep", "fp32", "official"] = "keep",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another layout: fastidc folder, official pytorch_model.bin.*, or OpenAI CLIP.

    Args:
        src: SRC, a fastidc run, an official file of either stage, an OpenAI CLIP file, or open_clip:NAME/TAG.
        dst: DST, what to write: a folder (fastidc), *.bin* (official), *.pt or *.safetensors (openai).
        layout: The layout, where the name of DST does not tell it.
        intra_layers: Vision layers that see one image alone, for sources that do not say it; by default 9 of 12.
        dtype: Keep the source's, write fp32, or what the official code saves (fp16 and fp32).
        overwrite: Replace DST.
    """
    from fastidc.convert import convert

    print(convert(src, dst, layout=layout, intra_layers=intra_layers, dtype=dtype, overwrite=overwrite))


def demo(out: Path = Path("runs/demo"), seed: int = 0, device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
    """Everything at once on a small world: render, adapt, fine-tune, caption, score, report.

    Args:
        out: Folder for data, runs, captions, metrics and report.html.
        seed: Seed of the world and of the training.
        device: Where to train.
    """
    from fastidc.demo import run_demo

    run_demo(out, seed, device)


def doctor() -> None:
    """What this machine has, which backend serves each op and why the others do not, and what each absence costs."""
    from fastidc.doctor import report

    print(report())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0, 2 for bad input, 130 when interrupted)."""
    import tyro

    actions = {"build": cache_build, "info": cache_info}
    chosen = tuple(Annotated[Any, tyro.conf.subcommand(name=name, constructor=action)] for name, action in actions.items())

    def cache(command: Union[chosen]) -> None:  # noqa: UP007
        """A data set's images, decoded once: build such a file, or look at one."""

    commands = {"render": render, "cache": cache, "adapt": adapt, "finetune": finetune, "convert": convert, "demo": demo, "doctor": doctor}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fastidc",
            description="CLIP for image difference captioning: render pairs, adapt, fine-tune, caption, score.",
            args=None if argv is None else list(argv),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except FastidcError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LostPeerError):  # of torchrun's processes one speaks
            print(f"fastidc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("fastidc: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
