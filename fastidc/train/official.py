"""`python -m fastidc.train`: the official scripts' run, with their files and log lines (clip4idc.md 5 to 8)."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from fastidc import checkpoint
from fastidc.data.loaders import check_images, distinct_images
from fastidc.data.records import PairRecord, load_records, recognise
from fastidc.data.sources import choose
from fastidc.errors import FastidcError
from fastidc.ops import check_environment
from fastidc.tokenizer import Tokenizer
from fastidc.train.distributed import World, is_main_process, processes, speaks
from fastidc.train.epochs import Training
from fastidc.train.examiner import Examiner
from fastidc.train.flags import parse
from fastidc.train.interpret import check_splits, images_folder, model_of, recipe_of, references_by_split, stage_of
from fastidc.train.judge import Judge
from fastidc.train.optim import Stage
from fastidc.train.policy import policy
from fastidc.train.precision import choose_precision
from fastidc.train.resume import Selection, check_same, load_optimizer, model_file
from fastidc.train.scalars import check_tensorboard
from fastidc.train.session import Session

_LARGEST_EVALUATION_BATCH = 256
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        args, dead = parse(argv)
        with processes(args.device) as (world, device):
            _run(args, dead, world, device)
    except FastidcError as error:
        if speaks(error):
            print(f"fastidc.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main_process():
            print("fastidc.train: interrupted.", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace, dead: list[str], world: World, device: torch.device) -> None:
    resumed = None if args.resume_model is None else load_optimizer(args.resume_model)
    if resumed is not None and args.init_model is None:
        args.init_model = str(model_file(Path(args.resume_model).parent, resumed.epoch))
    stage, why = stage_of(args, resumed)
    if resumed is not None and resumed.epoch + 1 >= args.epochs:
        raise FastidcError(f"{args.resume_model}: epoch {resumed.epoch + 1} of {args.epochs} is done; give more --epochs to go on.")
    kind = _in_official_words(lambda: recognise(args.data_path)) if args.datatype == "auto" else args.datatype
    precision = choose_precision(args.precision, device)
    check_environment(device, precision.dtype)
    recipe = recipe_of(args, stage, kind)
    if args.do_train:  # what cannot be is said before anything is read
        policy(stage, device.type, precision.name, recipe, world.size, compiling=args.compile, graph=args.graph, fp8=args.fp8)
    notices: list[str] = []
    records = _records(args, kind, notices.append)
    check_splits(args, records)
    references = references_by_split(args, kind, records, notices.append)
    torch.manual_seed(recipe.seed)
    model = model_of(args, stage)
    if recipe.max_words > model.config.context_length:
        raise FastidcError(f"--max_words {recipe.max_words} exceeds the model's {model.config.context_length} positions; lower it.")
    checkpoint.check_expressible(args.init_model or args.pretrained_clip_name, model.config, "official")
    if args.tensorboard:
        check_tensorboard()
    out = Path(args.output_dir)
    evaluation_batch = min(args.batch_size_val, _LARGEST_EVALUATION_BATCH)
    workers = max(1, args.num_thread_reader)
    paths, size = distinct_images(records.values() if args.do_train else [records["test"]]), model.config.image_size
    cache = None if args.cache is None else Path(args.cache)
    chosen = world.on_main(lambda: choose(args.loader, cache, args.data_path, paths, size, workers, device, world.local_size))
    images = chosen.open(args.data_path, paths, size, device)
    search = {"beams": args.beams, "length_penalty": args.length_penalty}
    session, selection = None, Selection(out, args.select)
    if args.do_train:
        session = Session(
            stage,
            recipe,
            model,
            records["train"],
            images,
            world,
            device,
            precision,
            workers,
            evaluation_batch,
            compiling=args.compile,
            graph=args.graph,
            fp8=args.fp8,
            **search,
        )
        judge = session.judge
        if resumed is not None:
            check_same(resumed, session, args.resume_model, args.init_model)
            session.optimizer.load_state_dict(resumed.optimizer, args.resume_model)
            selection.take_up(Path(args.resume_model).parent, resumed.epoch)
    else:
        precision.prepare(model.to(device))
        judge = Judge(stage, model, Tokenizer.of(model.config), images, recipe, world, precision, evaluation_batch, **search)
    if chosen.decodes:
        world.on_main(lambda: check_images(paths, workers))
    world.on_main(lambda: _make_folder(out))
    log = _log(out, world)
    try:
        with logging_redirect_tqdm([log]), Examiner(log, judge, kind, records, references, args.ties, out) as examiner:
            _announce(log, args, dead, why, notices, device, records, stage)
            if chosen.note:
                log.info(chosen.note)
            if session is None:
                examiner.final("eval")
            else:
                if advice := precision.advice(recipe.lr * recipe.coef_lr):
                    log.warning(advice)
                Training(args, log, session, examiner, out, resumed, selection).go()
    finally:
        for handler in list(log.handlers):
            handler.close()
            log.removeHandler(handler)


def _in_official_words(read: Callable[[], T]) -> T:
    """``read()``, its refusals with the flags of this command line."""
    try:
        return read()
    except FastidcError as refusal:
        raise FastidcError(str(refusal).replace("--dataset", "--datatype").replace("--images", "--features_path")) from None


def _records(args: argparse.Namespace, kind: str, report: Callable[[str], None]) -> dict[str, list[PairRecord]]:
    images = images_folder(args, kind)
    return _in_official_words(
        lambda: load_records(args.data_path, kind, images=images, empty="keep", report=report, quarantine=args.quarantine)
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").open("a").close()
    except OSError as error:
        raise FastidcError(f"{out}: cannot be written ({error.strerror or error}); choose another --output_dir.") from None


def _log(out: Path, world: World) -> logging.Logger:
    """The first process's log, into log.txt and to the terminal; the other processes' say nothing."""
    log = logging.getLogger(f"fastidc.train.{world.rank}")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()
    log.disabled = not world.is_main
    if log.disabled:
        return log
    for handler in (logging.FileHandler(out / "log.txt", encoding="utf-8"), logging.StreamHandler()):
        handler.setFormatter(logging.Formatter("%(asctime)s:%(levelname)s: %(message)s"))
        log.addHandler(handler)
    return log


def _announce(
    log: logging.Logger,
    args: argparse.Namespace,
    dead: list[str],
    why: str,
    notices: list[str],
    device: torch.device,
    records: dict[str, list[PairRecord]],
    stage: Stage,
) -> None:
    log.info("Effective parameters:")
    for name, value in sorted(vars(args).items()):
        log.info("  <<< %s: %s", name, value)
    log.info("device: %s n_gpu: %s", device, torch.cuda.device_count() if device.type == "cuda" else 0)
    log.log(logging.WARNING if "no --init_model" in why else logging.INFO, "task_type: %s (%s)", args.task_type, why)
    if args.do_train and not args.resume_model and (old := sorted(path.name for path in Path(args.output_dir).glob("pytorch_*.bin.*"))):
        log.warning("%s holds an earlier run (%s, ...); its files are replaced epoch by epoch", args.output_dir, old[0])
    if dead:
        log.warning("without effect, as in the official code: %s", ", ".join(f"--{name}" for name in dead))
    for notice in notices:
        log.warning(notice)
    for split in ("test", "val"):
        size = len(records[split]) if stage == "finetune" else sum(len(record.captions) for record in records[split])
        log.info("***** Running %s *****", split)
        log.info("  Num examples = %d", size)
        if split == "test":
            log.info("  Batch size = %d", args.batch_size_val)
            log.info("  Num steps = %d", -(-size // args.batch_size_val))
