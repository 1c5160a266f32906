"""The command line of the official scripts, all 46 flags of each, and fastidc's own beside them (clip4idc.md 8)."""

import argparse
import os
from collections.abc import Sequence

from fastidc.data.augment import Augmentation
from fastidc.data.sources import LOADERS
from fastidc.errors import FastidcError

# Flags that decide nothing in the official code, with its defaults. They are accepted so that a command line can be kept.
DEAD = {
    "do_pretrain": False,
    "lr_decay": 0.9,
    "margin": 0.1,
    "hard_negative_rate": 0.5,
    "negative_weighting": 1,
    "n_pair": 1,
    "feature_framerate": 1,
    "do_lower_case": False,
    "fp16": False,
    "fp16_opt_level": "O1",
    "use_mil": False,
    "sampled_use_mil": False,
    "text_num_hidden_layers": 12,
    "visual_num_hidden_layers": 12,
    "cross_num_hidden_layers": 2,
    "n_gpu": 1,
    "world_size": 0,
    "rank": 0,
    "local_rank": 0,
    "cache_dir": "",
    "cross_model": "cross-base",
}
DATATYPES = ("auto", "clevr", "spot", "ier", "birds", "table", "folder")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise FastidcError(f"{message}; see `python -m fastidc.train --help`.")


def parser() -> argparse.ArgumentParser:
    """Official flags with official defaults, but for --datatype, --max_words, --features_path and --task_type (README: migration)."""
    p = _Parser(
        prog="python -m fastidc.train",
        description="Drop-in for CLIP4IDC's main_task_retrieval.py and main_task_caption.py: the same flags, the same files.",
        allow_abbrev=False,
    )
    run = p.add_argument_group("run")
    run.add_argument("--do_train", action="store_true", help="train, and evaluate after every epoch")
    run.add_argument("--do_eval", action="store_true", help="evaluate --init_model on the test split (training wins where both are given)")
    run.add_argument(
        "--task_type",
        choices=("retrieval", "caption"),
        help="adaptation or captioning; without it: what --resume_model was doing, else captioning where --init_model is given and --do_train, "
        "or where it holds a captioner, or with --gt_dir; else retrieval",
    )
    run.add_argument("--output_dir", required=True, help="folder for log.txt, checkpoints and captions")
    run.add_argument("--epochs", type=int, default=20)
    run.add_argument("--seed", type=int, default=42, help="of initialisation, order, captions and dropout, on every data set")
    run.add_argument("--n_display", type=int, default=100, help="log a line every so many optimiser steps")
    run.add_argument("--num_thread_reader", type=int, default=1, help="threads that read images; they never change a result")
    run.add_argument(
        "--gt_dir",
        default=None,
        help="captioning: folder with {datatype}_total_change_captions_reformat.json (default gt); made from the annotations where it is absent",
    )

    data = p.add_argument_group("data")
    data.add_argument("--datatype", choices=DATATYPES, default="auto")
    data.add_argument("--data_path", default="data/datatype", help="folder of the data set, or a table of pairs")
    data.add_argument("--features_path", default=None, help="folder of the images (not read for clevr, whose layout is fixed)")
    data.add_argument("--max_words", type=int, default=32, help="tokens of a caption, and decoding steps")

    model = p.add_argument_group("model")
    model.add_argument("--init_model", default=None, help="a pytorch_model.bin.* of either stage, or a fastidc run")
    model.add_argument("--resume_model", default=None, help="a pytorch_opt.bin.*; --init_model is then the pytorch_model.bin.* beside it")
    model.add_argument(
        "--pretrained_clip_name", default="ViT-B/32", help="CLIP to start from where there is no --init_model: a name or a file"
    )
    model.add_argument("--decoder_model", default="decoder-base", help="decoder-base, or a folder with decoder_config.json")
    model.add_argument("--intra_num_hidden_layers", type=int, default=9, help="vision layers that see one image alone")
    model.add_argument("--linear_patch", choices=("2d", "3d"), default="2d", help="3d is the official code's dead end, and refused")

    optim = p.add_argument_group("optimisation")
    optim.add_argument("--lr", type=float, default=1e-4, help="rate of the new parameters")
    optim.add_argument(
        "--coef_lr", type=float, default=1.0, help="CLIP's rate is lr * coef_lr; the official 1e-3 belongs to --precision fp16-official"
    )
    optim.add_argument("--warmup_proportion", type=float, default=0.1)
    optim.add_argument("--batch_size", type=int, default=256, help="samples a step, of all processes together")
    optim.add_argument(
        "--batch_size_val", type=int, default=3500, help="pairs at a time in evaluation (at most 256 a process); changes no result"
    )
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optim.add_argument("--freeze_layer_num", type=int, default=0, help="-1 nothing, 0 the stem and the tables, k also the first k blocks")

    ours = p.add_argument_group("fastidc's own")
    ours.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32", "fp16-official"), default="auto")
    ours.add_argument(
        "--select",
        choices=("val", "test"),
        default="val",
        help="split that is scored after every epoch and chooses the best; test is the official protocol",
    )
    ours.add_argument(
        "--ties", choices=("legacy", "strict"), default="legacy", help="which ranking of tied captions the official log lines show"
    )
    ours.add_argument("--gather-grad", choices=("local", "full"), default="local", help="retrieval, several processes: local is official")
    ours.add_argument(
        "--micro-batch",
        type=int,
        help="retrieval: hold the activations of so many samples of a process at a time; the loss and its gradient stay the whole batch's",
    )
    ours.add_argument(
        "--token-mean", choices=("process", "global"), default="process", help="captioning, several processes: process is official"
    )
    ours.add_argument("--beams", type=int, default=1, help="captioning: captions running at once in evaluation; 1 is greedy, as officially")
    ours.add_argument("--length-penalty", type=float, default=0.0, help="with --beams: log-probabilities are divided by length ** this")
    ours.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="captioning: torch.compile around the captioner; auto does on CUDA"
    )
    ours.add_argument(
        "--graph",
        choices=("auto", "on", "off"),
        default="auto",
        help="the whole step as a CUDA graph for each shape; auto does with one process; off trains step by step, with the same results but for rounding and dropout's draws",
    )
    ours.add_argument(
        "--fp8",
        action="store_true",
        help="products of the blocks in 8-bit floating point where they gain from it (bf16 on Ada, Hopper or newer)",
    )
    ours.add_argument(
        "--loader",
        choices=LOADERS,
        default="auto",
        help="pixels decoded by pillow or dali, or from a cache (`fastidc cache build`) on the disk, in memory, or resident on the device; auto takes a cache that fits",
    )
    ours.add_argument(
        "--augment",
        default="",
        help="training images changed at random, both of a pair alike: crop=0.8,brightness=0.2,contrast=0.2,saturation=0.2,noise=4,erase=0.25,same_colours=no",
    )
    ours.add_argument("--cache", default=None, help="the cache; by default fastidc-cache-SIZE.bin in the folder of --data_path")
    ours.add_argument("--quarantine", default=None, help="a file of `fastidc check --quarantine`, whose pairs are left out")
    ours.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    ours.add_argument("--tensorboard", action="store_true", help="also write curves into {output_dir}/tensorboard")

    dead = p.add_argument_group("accepted and without effect, as officially")
    for name, default in DEAD.items():
        spellings = ["--local_rank", "--local-rank"] if name == "local_rank" else [f"--{name}"]
        # The default is suppressed, so that what was given can be told from what was not.
        if default is False:
            dead.add_argument(*spellings, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            kind = int if name == "local_rank" else str  # whatever it says, it decides nothing
            dead.add_argument(*spellings, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    dead.description = " ".join(f"--{name}" for name in DEAD)
    return p


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The checked flags, and those given that have no effect. FastidcError for a bad flag."""
    args = parser().parse_args(argv)
    dead = [name for name in DEAD if hasattr(args, name)]
    local_rank = getattr(args, "local_rank", None)
    if local_rank is not None:  # torch.distributed.launch before 2.0 says it by the flag alone
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        dead.remove("local_rank")

    def refuse(sentence: str) -> None:
        raise FastidcError(sentence)

    if not args.do_train and not args.do_eval:
        refuse("give --do_train or --do_eval.")
    if not args.do_train and (args.graph == "on" or args.fp8):
        refuse("--graph on and --fp8 are of training, and there is no --do_train; leave them out.")
    if args.do_eval and not args.do_train and args.init_model is None:
        refuse("--do_eval evaluates a trained model; give it with --init_model.")
    if not args.output_dir:
        refuse("--output_dir is empty; give a folder.")
    if args.linear_patch == "3d":
        refuse("--linear_patch 3d is not supported: no published model uses it, and the official code freezes nothing under it; use 2d.")
    for name, least in {"epochs": 1, "batch_size": 1, "batch_size_val": 1, "n_display": 1, "num_thread_reader": 0, "max_words": 3, "gradient_accumulation_steps": 1, "freeze_layer_num": -1, "intra_num_hidden_layers": 1}.items():  # fmt: skip
        if getattr(args, name) < least:
            refuse(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.micro_batch is not None and args.micro_batch < 1:
        refuse(f"--micro-batch must be at least 1, got {args.micro_batch}.")
    Augmentation.parse(args.augment)
    if not 0 <= args.warmup_proportion < 1:
        refuse(f"--warmup_proportion must lie in [0, 1), got {args.warmup_proportion}.")
    for name in ("lr", "coef_lr"):
        if not 0 <= getattr(args, name) < float("inf"):
            refuse(f"--{name} must be a number from 0, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must lie in 0 to 2**63 - 1, got {args.seed}.")
    if args.resume_model is not None and not args.do_train:
        refuse("--resume_model goes on with training; give --do_train with it, or leave it out.")
    return args, dead
