"""`fastidc adapt` and `fastidc finetune`: from a data folder and an initialisation to a finished run folder."""

import dataclasses
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from fastidc import checkpoint
from fastidc.config import ModelConfig, Preset, Recipe, TrainOptions, preset
from fastidc.data.images import ImageStore
from fastidc.data.loaders import PairLoader, check_images
from fastidc.data.records import PairRecord, all_captions, load_records
from fastidc.errors import FastidcError
from fastidc.evaluate.coco import write_references, write_results
from fastidc.evaluate.predict import embed_split, predict_captions, references_of
from fastidc.evaluate.retrieval import retrieval_metrics
from fastidc.files import write_json
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import Tokenizer, vocabulary_of
from fastidc.train.engine import StepLog, autocast, choose_precision, fit, keep_freed_memory
from fastidc.train.objectives import STAGES
from fastidc.train.optim import Optimizer, Stage


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a device; FastidcError where the named one is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise FastidcError(f"unknown device {name!r}; choose one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise FastidcError("device cuda was asked for, but torch sees no CUDA device; use --device cpu.")
    return torch.device(name)


def resolve(stage: Stage, options: TrainOptions) -> tuple[Preset, Recipe]:
    """The preset (an initial run's own by default) and its recipe with the user's values in it."""
    name = options.preset
    if name is None and options.init is not None and (Path(options.init) / checkpoint.CONFIG_FILE).is_file():
        name = checkpoint.read_config(options.init).get("preset")
    chosen = preset(name or "clevr")
    recipe = getattr(chosen, stage)
    changes = {field: getattr(options, field) for field in ("epochs", "steps", "batch_size", "max_words", "seed")}
    for field in ("epochs", "steps", "batch_size"):
        if changes[field] is not None and changes[field] < 1:
            raise FastidcError(f"--{field.replace('_', '-')} must be at least 1, got {changes[field]}.")
    if changes["max_words"] is not None and changes["max_words"] < 3:
        raise FastidcError(f"--max-words must be at least 3 (start, a word, end), got {changes['max_words']}.")
    if changes["seed"] is not None and not 0 <= changes["seed"] < 2**63:
        raise FastidcError(f"--seed must lie in 0 to 2**63 - 1, got {changes['seed']}.")
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


def train(stage: Stage, options: TrainOptions, images: ImageStore | None = None) -> dict:
    """Runs one stage. ``images`` may be shared by stages that read the same files at the same size. Leaves config.json, log.jsonl, model.safetensors and metrics.json in ``options.out`` (captioning also
    hyp_test.json and references.json) and returns the metrics. Everything that can be wrong is checked before the folder is made."""
    chosen, recipe = resolve(stage, options)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    records = load_records(options.data)
    if not records["train"]:
        raise FastidcError(f"{options.data}: the training split is empty.")
    torch.manual_seed(recipe.seed)
    model = build_model(stage, options, chosen, records["train"])
    if recipe.max_words > model.config.context_length:
        source = options.init or f"preset {chosen.name!r}"
        raise FastidcError(
            f"{source}: max_words {recipe.max_words} exceeds the model's {model.config.context_length} positions; lower --max-words."
        )
    model = model.to(device)
    tokenizer = Tokenizer.of(model.config)
    images = images or ImageStore(model.config.image_size)
    loader = PairLoader(stage, records["train"], tokenizer, images, recipe, options.workers)
    check_images([record for split in records.values() for record in split], options.workers)
    total_steps = recipe.steps or loader.steps * recipe.epochs
    optimizer = Optimizer(model, stage, recipe, total_steps)
    prepare_folder(options.out, options.overwrite)
    if device.type == "cpu":
        keep_freed_memory()

    facts = {
        "stage": stage,
        "preset": chosen.name,
        "recipe": dataclasses.asdict(recipe),
        "run": {
            "data": str(options.data),
            "init": options.init,
            "device": device.type,
            "precision": precision,
            "steps": total_steps,
            "torch": torch.__version__,
        },
    }
    checkpoint.write_config(options.out, model.config, facts)
    judge = Judge(stage, model, tokenizer, images, recipe, device, precision)
    keep_best = recipe.select == "best" and bool(records["val"])
    best: dict | None = None

    def after_epoch(epoch: int) -> None:
        nonlocal best
        if not keep_best:
            return
        score, metrics = judge.score(records["val"])
        tqdm.write(f"epoch {epoch + 1}: val {judge.criterion} {score:.4f}")
        if best is None or score >= best["score"]:  # a later epoch wins ties, as officially
            best = {"epoch": epoch, "score": score, "criterion": judge.criterion, "val": metrics}
            checkpoint.save(options.out, model.config, dict(model.named_parameters()), facts)

    pairs_a_step = recipe.batch_size * (len(records["train"][0].images) - 1 if stage == "finetune" else 1)
    log = StepLog(options.out / "log.jsonl")
    try:
        with tqdm(total=total_steps * pairs_a_step, desc=stage, unit="pair", smoothing=0.1) as bar:
            fit(
                model,
                loader,
                STAGES[stage],
                optimizer,
                total_steps=total_steps,
                device=device,
                precision=precision,
                log=log,
                bar=bar,
                after_epoch=after_epoch,
            )
    finally:
        log.close()
    if best is None:
        checkpoint.save(options.out, model.config, dict(model.named_parameters()), facts)
    else:
        model.load_weights(checkpoint.read(options.out).weights, str(options.out))
    metrics = {"stage": stage, "selected": best, "splits": {}}
    if records["test"]:
        metrics["splits"]["test"] = judge.final(records["test"], options.out)
    write_json(options.out / "metrics.json", metrics)
    return metrics


class Judge:
    """Scores a model on a split: retrieval after adaptation, captions after fine-tuning."""

    def __init__(self, stage: Stage, model: CLIP4IDC, tokenizer: Tokenizer, images: ImageStore, recipe: Recipe, device, precision: str):
        self.stage, self.model, self.tokenizer, self.images, self.recipe = stage, model, tokenizer, images, recipe
        self.device, self.precision = device, precision
        self.criterion = "text-to-pair R@1" if stage == "adapt" else "CIDEr"

    def score(self, records: list[PairRecord]) -> tuple[float, dict]:
        """The selection criterion and all metrics of a split (METEOR left out: it is slow and decides nothing)."""
        from fastidc.evaluate.captions import score_captions

        if self.stage == "adapt":
            metrics = self.retrieval(records)
            return metrics["text_to_pair"]["R@1"], metrics
        metrics = score_captions(references_of(records), self.captions(records), meteor=False)
        return metrics["CIDEr"], metrics

    def final(self, records: list[PairRecord], out: Path) -> dict:
        """All metrics of a split; captions and references are written beside."""
        from fastidc.evaluate.captions import score_by_subset

        if self.stage == "adapt":
            return self.retrieval(records)
        references, hypotheses = references_of(records), self.captions(records)
        write_references(out / "references.json", references)
        write_results(out / "hyp_test.json", hypotheses)
        return score_by_subset(references, hypotheses, {record.id: record.type for record in records if record.type})

    def retrieval(self, records: list[PairRecord]) -> dict:
        with self._evaluating(), tqdm(total=sum(len(r.images) - 1 for r in records), desc="embed", unit="pair", leave=False) as bar:
            similarity, owner = embed_split(self.model, self.tokenizer, records, self.images, max_words=self.recipe.max_words, bar=bar)
        return retrieval_metrics(similarity, owner)

    def captions(self, records: list[PairRecord]) -> dict[str, str]:
        with self._evaluating(), tqdm(total=sum(len(r.images) - 1 for r in records), desc="caption", unit="pair", leave=False) as bar:
            return predict_captions(self.model, self.tokenizer, records, self.images, max_length=self.recipe.max_words, bar=bar)

    def _evaluating(self):
        self.model.eval()
        return autocast(self.device, self.precision)
