"""`fastidc adapt|finetune|demo`."""

from pathlib import Path
from typing import Literal

from fastidc.config import TrainOptions


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
    """Adaptation: align image pairs with their captions (symmetric InfoNCE), then score retrieval on the test split.

    Example: fastidc adapt --data DATA --out runs/adapt --init open_clip:ViT-B-32-quickgelu/openai
    """
    _stage("adapt", options)


def finetune(options: TrainOptions) -> None:
    """Fine-tuning: train the captioner, caption the test split and score it.

    Example: fastidc finetune --data DATA --out runs/caption --init runs/adapt
    """
    _stage("finetune", options)


# What --help shows of their many flags; --help-all shows them all.
adapt.common = finetune.common = (
    "data", "out", "init", "preset", "epochs", "batch_size", "lr", "seed", "device", "resume", "overwrite",
)  # fmt: skip


def demo(
    out: Path = Path("runs/demo"),
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: Literal["auto", "none"] = "none",
) -> None:
    """Everything at once on a small world: render, adapt, fine-tune, caption, score, report.

    Example: fastidc demo --out runs/demo

    Args:
        out: Folder for data, runs, captions, metrics and report.html.
        seed: Seed of the world and of the training.
        device: Where to train.
        resume: auto goes on with a demo that was interrupted.
    """
    from fastidc.demo import run_demo

    run_demo(out, seed, device, resume=resume)
