"""`fastidc adapt` and `fastidc finetune`: from a data folder and an initialisation to a finished run folder."""

import dataclasses
import math
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fastidc import checkpoint
from fastidc.config import PRESETS, ModelConfig, Preset, Recipe, TrainOptions, preset
from fastidc.data.augment import Augmentation
from fastidc.data.loaders import check_images, distinct_images
from fastidc.data.records import PairRecord, all_captions, load_records, recognise
from fastidc.data.sources import choose
from fastidc.describe import fit_change_probability, no_change_sentences, write_change_probabilities, write_no_change
from fastidc.errors import FastidcError
from fastidc.evaluate.coco import write_references, write_results
from fastidc.evaluate.predict import references_of
from fastidc.files import append_line, write_json
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.ops import check_environment
from fastidc.tokenizer import vocabulary_of
from fastidc.train.compiled import shown_in
from fastidc.train.distributed import World, processes
from fastidc.train.engine import Step, StepLog, fit
from fastidc.train.optim import Stage
from fastidc.train.policy import policy
from fastidc.train.precision import choose_precision
from fastidc.train.scalars import Scalars, check_tensorboard
from fastidc.train.session import Session

# Fields of `TrainOptions` that replace a field of the recipe.
_RECIPE_OPTIONS = (
    "epochs", "steps", "batch_size", "accumulate", "micro_batch", "lr", "coef_lr", "freeze_layers", "max_words", "seed", "select", "gather_grad", "token_mean", "augment",
)  # fmt: skip


def resolve(stage: Stage, options: TrainOptions, dataset: str) -> tuple[Preset, Recipe]:
    """The preset (by default that of the initial run, else of the data set) and its recipe with the user's values in it."""
    name = options.preset
    if name is None and options.init is not None and (folder := checkpoint.folder_of(options.init)) is not None:
        name = checkpoint.read_config(folder).get("preset")
    if name is None:
        name = dataset if dataset in PRESETS else "spot"  # one's own pairs have no distractor either
    chosen = preset(name)
    recipe = getattr(chosen, stage)
    changes = {field: getattr(options, field) for field in _RECIPE_OPTIONS}
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


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Makes ``out``; refuses one that already holds something, unless it may be replaced, and one that cannot be made."""
    try:
        _prepare_folder(out, overwrite)
    except OSError as error:
        raise FastidcError(f"{out}: the run folder cannot be made ({error.strerror or error}); choose another --out.") from None


def _prepare_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise FastidcError(f"{out}: already exists and is not empty; choose another --out, or add --overwrite.")
        if not out.is_dir() or not (out / checkpoint.CONFIG_FILE).is_file():
            raise FastidcError(f"{out}: --overwrite replaces a fastidc run, and this is none; choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def train(stage: Stage, options: TrainOptions) -> dict:
    """Runs one stage, in this process or (under torchrun) in each of many. Leaves config.json, log.jsonl, model.safetensors and metrics.json
    in ``options.out`` (captioning also hyp_test.json, references.json, no_change.json and change_SPLIT.json) and returns the metrics. Everything that can be wrong is checked
    before the folder is made."""
    with processes(options.device) as (world, device):
        return _train(stage, options, world, device)


def _train(stage: Stage, options: TrainOptions, world: World, device: torch.device) -> dict:
    dataset = recognise(options.data) if options.dataset == "auto" else options.dataset
    chosen, recipe = resolve(stage, options, dataset)
    precision = choose_precision(options.precision, device)
    check_environment(device, precision.dtype)
    wishes = {"compiling": options.compile, "graph": options.graph, "fp8": options.fp8}
    policy(stage, device.type, precision.name, recipe, world.size, options.fsdp, **wishes)  # what cannot be is said before anything is read
    say = tqdm.write if world.is_main else lambda text: None
    records = load_records(options.data, dataset, images=options.images, empty=options.empty, report=say, quarantine=options.quarantine)
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
    if chosen_loader.decodes:
        world.on_main(lambda: check_images(paths, options.workers))
    world.on_main(lambda: prepare_folder(options.out, options.overwrite))
    return _Run(options, chosen, dataset, session, records).go()


class _Run:
    """One stage with its folder: what is written when."""

    def __init__(self, options: TrainOptions, chosen: Preset, dataset: str, session: Session, records: dict[str, list[PairRecord]]):
        self.out, self.session, self.records, self.world = options.out, session, records, session.world
        self.best: dict | None = None
        self.stale = 0  # epochs in a row that were not the best so far
        self.started = time.perf_counter()
        self.facts = {
            "stage": session.stage,
            "preset": chosen.name,
            "recipe": dataclasses.asdict(session.recipe),
            "run": {
                "data": str(options.data),
                "loader": session.loader.images.name,
                "dataset": dataset,
                "images": None if options.images is None else str(options.images),
                "empty": options.empty,
                "quarantine": None if options.quarantine is None else str(options.quarantine),
                "init": options.init,
                "device": session.device.type,
                "precision": session.precision.name,
                "processes": self.world.size,
                "fsdp": options.fsdp,
                "step": {field.name: getattr(session.policy, field.name).active for field in dataclasses.fields(session.policy)},
                "fp8_products": session.fp8_products,
                "beams": options.beams,
                "length_penalty": options.length_penalty,
                "steps": session.total_steps,
                "torch": torch.__version__,
            },
        }
        self.tensorboard: bool = options.tensorboard
        self.scalars: Scalars | None = None

    def _open_scalars(self) -> None:
        self.scalars = Scalars(self.out / "tensorboard")

    def go(self) -> dict:
        session, out = self.session, self.out
        self.world.on_main(lambda: checkpoint.write_config(out, session.model.config, self.facts))
        if self.tensorboard:
            self.world.on_main(self._open_scalars)
        self.log = StepLog(out / "log.jsonl", self.world, scalars=self.scalars)
        total = session.total_steps * session.pairs_a_step
        try:
            with (
                tqdm(total=total, desc=session.stage, unit="pair", smoothing=0.1, disable=not self.world.is_main) as self.bar,
                shown_in(self.bar, session.policy.compile.active),
            ):
                fit(
                    session.trainer,
                    session.loader,
                    session.recipe,
                    total_steps=session.total_steps,
                    on_step=self.on_step,
                    on_epoch=self.on_epoch,
                )
        finally:
            self.log.close()
        if self.world.is_main:
            tqdm.write(session.loader.summary())
        if self.best is None:
            self.save()
        else:
            session.whole.load_weights(self.world.on_main(lambda: checkpoint.read(out).weights), str(out))
        metrics = {"stage": session.stage, "dataset": self.facts["run"]["dataset"], "selected": self.best, "splits": {}}
        if session.stage == "finetune":
            self.no_change()
        if self.records["test"]:
            self.final(self.records["test"], metrics)
        self.world.on_main(lambda: write_json(out / "metrics.json", metrics))
        if self.scalars is not None:
            self.scalars.close()
        return metrics

    def on_step(self, step: Step) -> None:
        facts = {"step": step.number, "epoch": step.epoch, "lr": step.lrs, "seconds": round(time.perf_counter() - self.started, 3)}
        if self.session.precision.name == "fp16":
            facts["scaled"] = True
        self.log.add(facts, step.loss, step.grad_norm)
        self.bar.update(step.pairs)
        if self.session.device.type == "cpu" or step.number % 50 == 0:
            self.bar.set_postfix_str(f"loss {float(step.loss):.3f}", refresh=False)

    def on_epoch(self, epoch: int) -> bool:
        self.log.flush()
        recipe, judge = self.session.recipe, self.session.judge
        if recipe.select == "last":
            return False
        self.session.gather()
        score, metrics = judge.score(self.records[recipe.select])
        row = {"epoch": epoch, "split": recipe.select, "criterion": judge.criterion, "score": score}
        self.world.on_main(lambda: append_line(self.out / "scores.jsonl", row))
        if self.scalars is not None:
            self.scalars.add({judge.criterion: score}, self.session.optimizer.steps, recipe.select)
        self.stale += 1
        if self.best is None or score >= self.best["score"]:  # a later epoch wins ties, as officially
            self.best = {"epoch": epoch, "score": score, "criterion": judge.criterion, "split": recipe.select, recipe.select: metrics}
            self.stale = 0
            self.save()
        stop = recipe.patience is not None and self.stale > recipe.patience
        if self.world.is_main:
            tqdm.write(f"epoch {epoch + 1}: {recipe.select} {judge.criterion} {score:.4f}")
            if stop:
                tqdm.write(
                    f"stopped: {self.stale} epochs in a row without a better {judge.criterion}; epoch {self.best['epoch'] + 1} is kept."
                )
        return stop

    def save(self) -> None:
        model = self.session.gather()
        self.world.on_main(lambda: checkpoint.save(self.out, model.config, dict(model.named_parameters()), self.facts))

    def no_change(self) -> None:
        """What the model's probability of a change needs (no_change.json), and that of every pair of val and test (change_SPLIT.json)."""
        sentences, calibration = no_change_sentences(self.records["train"]), None
        for split in ("val", "test") if sentences else ():
            if records := self.records[split]:
                found = self.session.judge.change(records, sentences)
                self.world.on_main(lambda split=split, found=found: write_change_probabilities(self.out, split, found))
                if split == "val":
                    calibration = fit_change_probability(found, records)
        self.world.on_main(lambda: write_no_change(self.out, sentences, calibration))

    def final(self, records: list[PairRecord], metrics: dict) -> None:
        """Puts all metrics of the test split into ``metrics``; captions and references are written beside."""
        judge = self.session.judge
        if self.session.stage == "adapt":
            retrieval = judge.retrieval(records, ("strict", "legacy"))
            metrics["splits"]["test"], metrics["legacy_ties"] = retrieval["strict"], {"test": retrieval["legacy"]}
            return
        hypotheses = judge.captions(records)
        self.world.on_main(lambda: write_references(self.out / "references.json", references_of(records)))
        self.world.on_main(lambda: write_results(self.out / "hyp_test.json", hypotheses))
        metrics["splits"]["test"] = judge.caption_scores(records, hypotheses)
