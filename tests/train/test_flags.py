"""The frozen command line of the two official scripts."""

import pytest

from fastidc.errors import FastidcError
from fastidc.train.flags import DEAD, parse, parser

# name -> official default (None: required or none), read off the official scripts; "store_true" flags are False.
OFFICIAL = {
    "do_pretrain": False, "do_train": False, "do_eval": False, "data_path": "data/datatype", "features_path": "data/datatype/images",
    "num_thread_reader": 1, "lr": 1e-4, "epochs": 20, "batch_size": 256, "batch_size_val": 3500, "lr_decay": 0.9, "n_display": 100,
    "seed": 42, "max_words": 20, "margin": 0.1, "hard_negative_rate": 0.5, "negative_weighting": 1, "n_pair": 1, "output_dir": None,
    "cross_model": "cross-base", "decoder_model": "decoder-base", "init_model": None, "resume_model": None, "do_lower_case": False,
    "warmup_proportion": 0.1, "gradient_accumulation_steps": 1, "n_gpu": 1, "cache_dir": "", "fp16": False, "fp16_opt_level": "O1",
    "task_type": None, "datatype": "msrvtt", "world_size": 0, "local_rank": 0, "rank": 0, "coef_lr": 1.0, "use_mil": False,
    "sampled_use_mil": False, "text_num_hidden_layers": 12, "visual_num_hidden_layers": 12, "intra_num_hidden_layers": 9,
    "cross_num_hidden_layers": 2, "freeze_layer_num": 0, "linear_patch": "2d", "pretrained_clip_name": "ViT-B/32",
}  # fmt: skip
RETRIEVAL = OFFICIAL | {"feature_framerate": 1}
CAPTION = OFFICIAL | {"gt_dir": "gt"}
# Defaults that we changed on purpose (README, migration).
CHANGED = {"datatype": "auto", "max_words": 32, "features_path": None, "gt_dir": None}
OURS = {
    "precision",
    "select",
    "ties",
    "gather_grad",
    "micro_batch",
    "compile",
    "graph",
    "fp8",
    "beams",
    "length_penalty",
    "token_mean",
    "augment",
    "device",
    "loader",
    "quarantine",
    "cache",
    "tensorboard",
    "help",
}


@pytest.mark.parametrize("flags", [RETRIEVAL, CAPTION], ids=["retrieval", "caption"])
def test_all_46_flags_of_each_script(flags):
    assert len(flags) == 46
    actions = {action.dest: action for action in parser()._actions}
    for name, default in flags.items():
        assert f"--{name}" in actions[name].option_strings
        value = DEAD[name] if name in DEAD else actions[name].default
        assert value == CHANGED.get(name, default), name
        assert (actions[name].nargs == 0) == (default is False), f"--{name} takes a value, or none, as officially"
    assert set(actions) == set(RETRIEVAL) | set(CAPTION) | OURS


def test_flags_of_training_need_training():
    for flags in (["--graph", "on"], ["--fp8"]):
        with pytest.raises(FastidcError, match="--graph on and --fp8 are of training"):
            parse(["--do_eval", "--init_model", "x", "--output_dir", "x", *flags])


def test_dead_flags_are_named_and_both_spellings_of_local_rank_serve(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    _, dead = parse(["--do_train", "--output_dir", "x", "--fp16", "--margin", "0.3", "--local-rank", "1"])
    assert dead == ["margin", "fp16"]
    import os

    assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun's word counts
    parse(["--do_train", "--output_dir", "x", "--local_rank=1"])
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give --do_train or --do_eval."),
        (["--do_eval"], "--do_eval evaluates a trained model; give it with --init_model."),
        (["--do_train", "--linear_patch", "3d"], "--linear_patch 3d is not supported"),
        (["--do_train", "--epochs", "0"], "--epochs must be at least 1, got 0."),
        (["--do_train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--do_train", "--datatype", "msrvtt"], "argument --datatype: invalid choice: 'msrvtt'"),
        (["--do_train", "--freeze_layer_num", "-2"], "--freeze_layer_num must be at least -1"),
        (["--do_train", "--lr", "-1"], "--lr must be a number from 0"),
        (["--do_train", "--warmup_proportion", "1"], "--warmup_proportion must lie in [0, 1)"),
        (["--do_train", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--do_eval", "--init_model", "a", "--resume_model", "b"], "--resume_model goes on with training"),
    ],
)
def test_bad_flags_are_a_sentence(flags, sentence):
    with pytest.raises(FastidcError) as refusal:
        parse([*flags, "--output_dir", "x"])
    assert sentence in str(refusal.value)
