"""`fastidc adapt` and `fastidc finetune`: from a data folder and an initialisation to a finished run folder."""

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from fastidc import checkpoint
from fastidc.config import PRESETS, ModelConfig, Preset, Recipe, TrainOptions, preset
from fastidc.data.augment import Augmentation
from fastidc.data.loaders import check_images, distinct_images
from fastidc.data.patience import SlowImageError
from fastidc.data.records import PairRecord, all_captions, recognise
from fastidc.data.sources import choose
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.ops import check_environment
from fastidc.tokenizer import vocabulary_of
from fastidc.train.distributed import World, processes
from fastidc.train.identity import RECIPE_OPTIONS, check_same, identity
from fastidc.train.left_out import pairs_of
from fastidc.train.optim import Stage
from fastidc.train.policy import policy
from fastidc.train.precision import choose_precision
from fastidc.train.progress import Progress
from fastidc.train.scalars import check_tensorboard
from fastidc.train.session import Session
from fastidc.train.stage import StageRun
from fastidc.train.start import Start, check_folder, check_safety, find, finished_metrics, held, prepare_folder, wanted


def resolve(stage: Stage, options: TrainOptions, dataset: str) -> tuple[Preset, Recipe]:
    """The preset (by default that of the initial run, else of the data set) and its recipe with the user's values in it."""
    name = options.preset
    if name is None and options.init is not None and (folder := checkpoint.folder_of(options.init)) is not None:
        name = checkpoint.read_config(folder).get("preset")
    if name is None:
        name = dataset if dataset in PRESETS else "spot"  # one's own pairs have no distractor either
    chosen = preset(name)
    recipe = getattr(chosen, stage)
    changes = {field: getattr(options, field) for field in RECIPE_OPTIONS}
    if stage == "finetune" and options.micro_batch is not None:
        raise FastidcError("--micro-batch belongs to adaptation, whose loss needs a whole batch; in fine-tuning use --accumulate.")
    for field in ("epochs", "steps", "batch_size", "accumulate", "micro_batch"):
        if changes[field] is not None and changes[field] < 1:
            raise FastidcError(f"--{field.replace('_', '-')} must be at least 1, got {changes[field]}.")
    for field in ("lr", "coef_lr"):
        if changes[field] is not None and not 0 <= changes[field] < math.inf:
            raise FastidcError(f"--{field.replace('_', '-')} must be a number from 0, got {changes[field]}.")
    if changes["freeze_layers"] is not None and changes["freeze_layers"] < -1:
        raise FastidcError(f"--freeze-layers must be -1 (nothing), 0 (the stem and the tables) or more, got {changes['freeze_layers']}.")
    if changes["max_words"] is not None and changes["max_words"] < 3:
        raise FastidcError(f"--max-words must be at least 3 (start, a word, end), got {changes['max_words']}.")
    if changes["seed"] is not None and not 0 <= changes["seed"] < 2**63:
        raise FastidcError(f"--seed must lie in 0 to 2**63 - 1, got {changes['seed']}.")
    Augmentation.parse(changes["augment"] or "")
    if options.workers < 1:
        raise FastidcError(f"--workers must be at least 1, got {options.workers}.")
    if changes["epochs"] is not None and changes["steps"] is None:
        recipe = dataclasses.replace(recipe, steps=None)  # epochs that a user asks for win over a preset's number of steps
    return chosen, dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})


def build_model(stage: Stage, options: TrainOptions, chosen: Preset, records: list[PairRecord]) -> CLIP4IDC:
    """The model that this stage starts from: ``--init``, or the preset's shape from random initialisation."""
    shape = chosen.model
    captioner_layers = (shape or ModelConfig()).captioner_layers if stage == "finetune" else None
    if options.init is not None:
        model = CLIP4IDC.from_pretrained(options.init, options.intra_layers, captioner_layers)
    elif shape is None:
        raise FastidcError(
            f"preset {chosen.name!r} starts from pretrained weights; give them with --init (a CLIP file, open_clip:ViT-B-32-quickgelu/openai "
            "or a fastidc run), or train from nothing with --preset tiny."
        )
    else:
        if chosen.restrict_vocabulary:
            ids = vocabulary_of(all_captions(records))
            shape = shape.replace(vocabulary=ids, vocab_size=len(ids))
        try:
            model = CLIP4IDC.from_pretrained(shape, options.intra_layers, captioner_layers)
        except FastidcError as error:
            raise FastidcError(str(error).replace("model config", f"preset {chosen.name!r} with --intra-layers", 1)) from None
    if stage == "adapt":
        model.drop_captioner()
    return model


def train(stage: Stage, options: TrainOptions) -> dict:
    """Runs one stage, in this process or (under torchrun) in each of many. Leaves config.json, log.jsonl, model.safetensors and metrics.json
    in ``options.out`` (captioning also hyp_test.json, references.json, no_change.json and change_SPLIT.json) and returns the metrics. Everything that can be wrong is checked
    before the folder is made. Interrupted where a signal ended the run, which ``options.resume`` continues; resuming a finished one returns its metrics."""
    check_safety(options)
    with processes(options.device) as (world, device):
        # where a split is empty the last epoch is kept, whatever was asked for
        asked = {field: getattr(options, field) for field in RECIPE_OPTIONS if field != "select"}
        metrics = world.on_main(lambda: finished_metrics(options.out, stage, asked)) if wanted(options) == "auto" else None
        if metrics is not None:
            if world.is_main:
                tqdm.write(f"{options.out}: the run is finished; there is nothing to resume.")
            return metrics
        with ExitStack() as stack:
            return _train(stage, options, world, device, stack)


def _train(stage: Stage, options: TrainOptions, world: World, device: torch.device, stack: ExitStack) -> dict:
    """`train`; ``stack`` ends the hold on ``options.out``."""
    dataset = recognise(options.data) if options.dataset == "auto" else options.dataset
    chosen, recipe = resolve(stage, options, dataset)
    precision = choose_precision(options.precision, device)
    check_environment(device, precision.dtype)
    wishes = {"compiling": options.compile, "graph": options.graph, "fp8": options.fp8}
    policy(stage, device.type, precision.name, recipe, world.size, options.fsdp, **wishes)  # what cannot be is said before anything is read
    say = tqdm.write if world.is_main else lambda text: None
    begins: list[Start | None] = [None]  # the first process alone reads snapshots
    locked = world.is_main and options.out.exists()

    def find_start() -> None:
        if locked:
            stack.enter_context(held(options.out))
        begins[0] = find(wanted(options), options.out, say)
        if begins[0] is None:
            check_folder(options.out, options.overwrite, wanted(options))  # a look at all images may take long

    world.on_main(find_start)
    pairs = pairs_of(options, dataset, world, begins, say)
    records = pairs.records
    if not records["train"]:
        raise FastidcError(f"{options.data}: the training split is empty.")
    if recipe.select != "last" and not records[recipe.select]:
        say(f"{options.data}: the {recipe.select} split is empty, so the last epoch is kept.")
        recipe = dataclasses.replace(recipe, select="last")
    torch.manual_seed(recipe.seed)
    model = build_model(stage, options, chosen, records["train"])
    if recipe.max_words > model.config.context_length:
        source = options.init or f"preset {chosen.name!r}"
        raise FastidcError(
            f"{source}: max_words {recipe.max_words} exceeds the model's {model.config.context_length} positions; lower --max-words."
        )
    paths, size = distinct_images(records.values()), model.config.image_size
    chosen_loader = world.on_main(
        lambda: choose(options.loader, options.cache, options.data, paths, size, options.workers, device, world.local_size)
    )
    session = Session(
        stage,
        recipe,
        model,
        records["train"],
        chosen_loader.open(options.data, paths, size, device),
        world,
        device,
        precision,
        options.workers,
        fsdp=options.fsdp,
        compiling=options.compile,
        graph=options.graph,
        fp8=options.fp8,
        beams=options.beams,
        length_penalty=options.length_penalty,
    )
    if chosen.model is None and (advice := precision.advice(recipe.lr * recipe.coef_lr)):
        say(advice)
    if options.tensorboard:
        check_tensorboard()
    if chosen_loader.note:
        say(chosen_loader.note)
    if chosen_loader.decodes and not pairs.looked:
        world.on_main(lambda: _check_images(paths, options))
    mine = identity(session, dataset, records, options.fp8, None if pairs.left is None else pairs.left.held)

    def begin() -> bool:
        if not locked:
            stack.enter_context(held(options.out))
            if begins[0] is None and find(wanted(options), options.out, say) is not None:
                raise FastidcError(f"{options.out}: another run has begun there meanwhile; choose another --out.")
        if begins[0] is not None:
            Progress.of(begins[0].snapshot.state, str(begins[0].snapshot.path))  # before anything in --out is changed
            check_same(begins[0].snapshot.state.get("identity"), mine, str(begins[0].snapshot.path))
        if begins[0] is None or begins[0].run.resolve() != options.out.resolve():
            prepare_folder(options.out, options.overwrite, wanted(options))
            pairs.write(options.data)
        return begins[0] is not None

    resumed = world.on_main(begin)
    said, facts = (None, None) if pairs.left is None else (pairs.left.said(), pairs.left.facts())
    if said is not None:
        say(said)
    run = StageRun(options, chosen, dataset, session, records, mine, facts)
    if resumed:
        run.go_on_from(begins[0])
    metrics = run.go()
    if said is not None:
        say(said)
    return metrics


def _check_images(paths: list[Path], options: TrainOptions) -> None:
    try:
        check_images(paths, options.workers)
    except SlowImageError:
        raise
    except FastidcError as refusal:
        way = "" if options.on_bad_data != "raise" else " --on-bad-data skip leaves out the pairs of all that are bad."
        raise FastidcError(f"{refusal}{way}") from None
