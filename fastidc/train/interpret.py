"""What the official flags mean: the task, the recipe, the model, the references."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from fastidc import checkpoint
from fastidc.config import PRESETS, ModelConfig, Recipe
from fastidc.data.records import PairRecord, read_json
from fastidc.errors import FastidcError
from fastidc.evaluate.coco import read_references
from fastidc.evaluate.predict import references_of
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.train.optim import Stage
from fastidc.train.resume import Resumed

STAGES: dict[str, Stage] = {"retrieval": "adapt", "caption": "finetune"}


def stage_of(args: argparse.Namespace, resumed: Resumed | None) -> tuple[Stage, str]:
    """The stage, and the sentence that says how it was told."""
    given = None if args.task_type is None else STAGES[args.task_type]
    if resumed is not None and given not in (None, resumed.stage):
        raise FastidcError(f"{args.resume_model}: belongs to another task than --task_type {args.task_type}; leave one of them out.")
    if given is not None:
        stage, why = given, "as given"
    elif resumed is not None:
        stage, why = resumed.stage, "because --resume_model was doing it"
    elif args.gt_dir is not None:
        stage, why = "finetune", "because --gt_dir is given"
    elif args.init_model is None:
        stage, why = "adapt", "because there is no --init_model; for captioning from CLIP alone give --task_type caption"
    elif args.do_train:
        stage, why = "finetune", "because training starts from --init_model"
    elif checkpoint.read(args.init_model).config.captioner_layers:
        stage, why = "finetune", "because --init_model holds a captioner"
    else:
        stage, why = "adapt", "because --init_model holds no captioner"
    args.task_type = "retrieval" if stage == "adapt" else "caption"
    return stage, why


def recipe_of(args: argparse.Namespace, stage: Stage, kind: str) -> Recipe:
    if stage == "finetune" and args.micro_batch is not None:
        raise FastidcError(
            "--micro-batch belongs to retrieval, whose loss needs a whole batch; in captioning use --gradient_accumulation_steps."
        )
    return dataclasses.replace(
        getattr(PRESETS[kind if kind in PRESETS else "spot"], stage),
        epochs=args.epochs,
        batch_size=args.batch_size,
        accumulate=args.gradient_accumulation_steps,
        micro_batch=args.micro_batch,
        lr=args.lr,
        coef_lr=args.coef_lr,
        warmup=args.warmup_proportion,
        freeze_layers=args.freeze_layer_num,
        max_words=args.max_words,
        seed=args.seed,
        select=args.select,
        gather_grad=args.gather_grad,
        token_mean=args.token_mean,
        augment=args.augment,
    )


def images_folder(args: argparse.Namespace, kind: str) -> Path | None:
    return None if kind == "clevr" or args.features_path is None else Path(args.features_path)


def references_by_split(
    args: argparse.Namespace, kind: str, records: dict[str, list[PairRecord]], report: Callable[[str], None]
) -> dict[str, dict[str, list[str]]]:
    """{split: {image_id: sentences}} of the splits that are scored: of --gt_dir's COCO file where it knows the split's pairs, else of the
    annotations, which ``report`` is told. FastidcError where a --gt_dir was given that lacks the file, or that has a split only in part."""
    path = Path(args.gt_dir or "gt") / f"{kind}_total_change_captions_reformat.json"
    splits = dict.fromkeys([*((args.select,) if args.do_train else ()), "test"])
    own = {split: references_of(records[split]) for split in splits}
    if args.task_type == "retrieval":
        return own
    if not path.is_file():
        if args.gt_dir is not None:
            raise FastidcError(
                f"{path}: no such file; make it with the data set's script, or leave --gt_dir out to score against the annotations."
            )
        return own
    known = read_references(path)
    for split, pairs in own.items():
        missing = [name for name in pairs if name not in known]
        if len(missing) == len(pairs):
            report(f"{path}: knows no pair of the {split} split, which is scored against the annotations.")
        elif missing:
            raise FastidcError(
                f"{path}: no annotation has image_id {missing[0]!r}, which is a pair of the {split} split ({len(missing)} such pairs); "
                "make the file anew from the same data, or leave --gt_dir out and the file away."
            )
        else:
            own[split] = {name: known[name] for name in pairs}
    return own


def check_splits(args: argparse.Namespace, records: dict[str, list[PairRecord]]) -> None:
    needed = (["train", args.select] if args.do_train else []) + ["test"]
    for split in needed:
        if not records[split]:
            way_out = "select epochs with --select test, or " if split == "val" and records["test"] else ""
            raise FastidcError(f"{args.data_path}: the {split} split is empty; {way_out}give the data set pairs for it.")


def _clip(name: str) -> str:
    """Where the CLIP called ``name`` is: a file or a folder, the official script's places, or open_clip, which downloads it."""
    if Path(name).exists() or name.startswith("open_clip:"):
        return name
    file = name.replace("/", "-") + ".pt"
    for folder in (Path("modules"), Path.home() / ".cache" / "clip"):
        if (folder / file).is_file():
            return str(folder / file)
    if name not in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"):
        raise FastidcError(f"--pretrained_clip_name {name}: no such file, and not a published ViT CLIP (ViT-B/32, ViT-B/16, ViT-L/14).")
    return f"open_clip:{name.replace('/', '-').replace('@336px', '-336')}-quickgelu/openai"


def model_of(args: argparse.Namespace, stage: Stage) -> CLIP4IDC:
    source = args.init_model or _clip(args.pretrained_clip_name)
    layers, dropout = _decoder(args.decoder_model)
    knows_its_split = (Path(source) / checkpoint.CONFIG_FILE).is_file()
    read = checkpoint.read(
        source,
        intra_layers=None if knows_its_split else args.intra_num_hidden_layers,
        captioner_layers=layers if stage == "finetune" else None,
    )
    if not args.do_train:
        if stage == "finetune" and "captioner." in read.fresh:
            raise FastidcError(f"{source}: holds no captioner, so it cannot caption; give --init_model a file of the captioning stage.")
        if any(name.startswith("pair_encoder.") for name in read.fresh):
            raise FastidcError(f"{source}: is a CLIP that never saw a pair; give --init_model a trained file.")
    if args.freeze_layer_num > read.config.vision_layers:
        raise FastidcError(f"--freeze_layer_num {args.freeze_layer_num} exceeds the model's {read.config.vision_layers} layers.")
    model = CLIP4IDC(read.config.replace(dropout=dropout))
    model.load_weights(read.weights, read.source, fresh=read.fresh, foreign=read.foreign)
    if stage == "adapt":
        model.drop_captioner()
    return model


def _decoder(name: str) -> tuple[int, float]:
    """Layers and dropout of the captioner that ``--decoder_model`` means; everything else of an official decoder_config.json is fixed."""
    default = ModelConfig()
    if name == "decoder-base":
        return default.captioner_layers, default.dropout
    path = Path(name) / "decoder_config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise FastidcError(f"{path}: must be an object with num_decoder_layers and the two dropouts.")
    layers = values.get("num_decoder_layers", default.captioner_layers)
    dropouts = {values.get(f"{kind}_dropout_prob", default.dropout) for kind in ("hidden", "attention_probs")}
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise FastidcError(f"{path}: num_decoder_layers must be a positive integer, got {layers!r}.")
    if len(dropouts) > 1:
        raise FastidcError(f"{path}: hidden_dropout_prob and attention_probs_dropout_prob differ; fastidc's captioner has one for both.")
    if values.get("hidden_act", "gelu") != "gelu":
        raise FastidcError(f"{path}: hidden_act is {values['hidden_act']!r}; the captioner has gelu only.")
    dropout = dropouts.pop()
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise FastidcError(f"{path}: hidden_dropout_prob must be a number in [0, 1), got {dropout!r}.")
    return layers, float(dropout)
