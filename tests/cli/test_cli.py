"""The command line as a user meets it: a whole small run, and one sentence with exit code 2 for whatever is wrong."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc import CLIP4IDC, Tokenizer, checkpoint
from fastidc.cli import main
from fastidc.config import PRESETS, TrainOptions
from fastidc.train.run import resolve, train

pytestmark = pytest.mark.usefixtures("module_without_java")
SPLITS = {"train": list(range(12)), "val": [20, 21, 22], "test": [30, 31, 32, 33]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", SPLITS)


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "adapt"
    flags = ["--data", str(data), "--out", str(out), "--preset", "tiny", "--steps", "4", "--batch-size", "4", "--device", "cpu"]
    assert main(["adapt", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def tuned(data, adapted, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finetune"
    flags = ["--data", str(data), "--out", str(out), "--init", str(adapted), "--steps", "5", "--batch-size", "4", "--seed", "3"]
    assert main(["finetune", *flags]) == 0
    return out


def test_adapt_leaves_a_whole_run(adapted):
    assert sorted(p.name for p in adapted.iterdir()) == ["config.json", "ledger.jsonl", "log.jsonl", "metrics.json", "model.safetensors"]
    config = json.loads((adapted / "config.json").read_text())
    assert config["preset"] == "tiny"
    assert config["recipe"]["batch_size"] == 4
    assert config["run"]["steps"] == 4
    assert config["model"]["captioner_layers"] == 0
    assert config["model"]["pair_input"] == "difference"
    rows = [json.loads(line) for line in (adapted / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["lr"] for row in rows)
    metrics = json.loads((adapted / "metrics.json").read_text())["splits"]["test"]
    for direction in ("text_to_pair", "pair_to_text"):
        assert {"R@1", "R@5", "R@10", "MdR", "MnR"} <= set(metrics[direction])


def test_finetune_leaves_a_whole_run(tuned, adapted):
    names = {"config.json", "hyp_test.json", "ledger.jsonl", "log.jsonl", "metrics.json", "model.safetensors", "references.json"}
    assert {p.name for p in tuned.iterdir()} == names | {"no_change.json", "change_val.json", "change_test.json"}
    assert all(0 <= p <= 1 for p in json.loads((tuned / "change_test.json").read_text()).values())
    config = json.loads((tuned / "config.json").read_text())
    assert (config["preset"], config["recipe"]["seed"], config["model"]["captioner_layers"]) == ("tiny", 3, 2)
    hypotheses = json.loads((tuned / "hyp_test.json").read_text())
    expected = [f"{n:06d}.png{suffix}" for suffix in ("", "_n") for n in SPLITS["test"]]
    assert [h["image_id"] for h in hypotheses] == expected, "every test pair, change pairs first"
    scores = json.loads((tuned / "metrics.json").read_text())["splits"]["test"]
    assert {"overall", "change", "no_change", "types"} <= set(scores)
    assert scores["overall"]["pairs"] == 8
    assert scores["overall"]["METEOR"] is not None or "METEOR_reason" in scores["overall"]
    model = CLIP4IDC.from_pretrained(tuned)
    ids = model.generate(*torch.randint(0, 256, (2, 2, 3, 112, 112), dtype=torch.uint8))
    assert isinstance(Tokenizer.of(model.config).decode(ids[0]), str)


def test_same_seed_same_weights(data, adapted, tmp_path):
    flags = ["--data", str(data), "--preset", "tiny", "--steps", "4", "--batch-size", "4", "--workers", "1", "--device", "cpu"]
    assert main(["adapt", *flags, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (adapted / "model.safetensors").read_bytes()


def test_training_lowers_the_loss(data, tmp_path):
    """Twelve scenes can be learnt by heart: the captioner's loss falls to a fraction."""
    flags = ["--data", str(data), "--preset", "tiny", "--steps", "25", "--batch-size", "6", "--device", "cpu"]
    assert main(["finetune", *flags, "--out", str(tmp_path / "run")]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]


@pytest.mark.slow
def test_official_recipe_trains_from_clip_weights_and_keeps_the_best_epoch(data, tmp_path):
    """`--preset clevr` on an OpenAI-layout file: the frozen stay, the new move, the kept epoch is the best on val."""
    config = worlds.SMALL.replace(head_dim=64, vision_width=128, vocab_size=49408, context_length=77)
    state = {k.removeprefix("clip."): t for k, t in worlds.official_state(config, "clip").items()}
    torch.save(state, tmp_path / "ViT.pt")
    common = ["--data", str(data), "--batch-size", "4", "--device", "cpu", "--precision", "fp32"]
    first = tmp_path / "adapt"
    assert main(["adapt", *common, "--init", str(tmp_path / "ViT.pt"), "--intra-layers", "2", "--epochs", "2", "--out", str(first)]) == 0
    model = CLIP4IDC.from_pretrained(first)
    assert torch.equal(model.pair_encoder.patch_embed.weight, state["visual.conv1.weight"]), "the stem is frozen"
    assert torch.equal(model.text_encoder.token_embedding, state["token_embedding.weight"]), "so is the word table"
    assert not torch.equal(model.pair_encoder.projection, state["visual.proj"])
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["selected"]["criterion"] == "text-to-pair R@1"
    assert metrics["selected"]["score"] == metrics["selected"]["val"]["text_to_pair"]["R@1"]
    second = tmp_path / "finetune"
    assert main(["finetune", *common, "--init", str(first), "--epochs", "1", "--out", str(second)]) == 0
    tuned = json.loads((second / "config.json").read_text())
    assert (tuned["preset"], tuned["model"]["captioner_layers"], tuned["recipe"]["seed"]) == ("clevr", 3, 2021)


def test_flags_win_over_the_preset(data, tmp_path):
    options = TrainOptions(data, tmp_path, preset="tiny", epochs=3, batch_size=7, seed=1)
    _, recipe = resolve("adapt", options, "clevr")
    assert (recipe.epochs, recipe.steps, recipe.batch_size, recipe.seed) == (3, None, 7, 1)
    official = PRESETS["clevr"]
    assert dataclasses.asdict(official.adapt) | {"epochs": 0} == {
        "epochs": 0, "batch_size": 128, "lr": 1e-4, "coef_lr": 1e-3, "optimizer": "bert_adam", "schedule": "warmup_cosine",
        "betas": (0.9, 0.98), "weight_decay": 0.2, "eps": 1e-6, "warmup": 0.1, "clip_norm": 1.0, "freeze_layers": 0, "augment": "",
        "freeze_tokens": True, "swap_distractor": 0.5, "flip": 0.0, "captions_per_pair": 1, "max_words": 32, "seed": 42, "steps": None, "accumulate": 1, "micro_batch": None, "select": "val",
        "patience": None, "gather_grad": "full", "token_mean": "process",
    }  # fmt: skip
    f = official.finetune
    assert (f.epochs, f.batch_size, f.schedule, f.betas, f.weight_decay, f.seed) == (50, 16, "warmup_linear", (0.9, 0.999), 0.01, 2021)
    assert (f.patience, f.freeze_tokens) == (10, True)
    spot = PRESETS["spot"]
    assert (spot.adapt.epochs, spot.adapt.batch_size, spot.finetune.batch_size, spot.finetune.freeze_tokens) == (20, 128, 16, False)


def refused(capsys, out, *argv):
    """The sentence that ``argv`` ends with; nothing may be left at ``out``."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("fastidc: ")
    assert "Traceback" not in captured.err + captured.out
    assert not out.exists(), "something half-written was left"
    return lines[-1]


def test_bad_input_is_one_sentence(data, tmp_path, capsys):
    out = tmp_path / "run"
    base = ["adapt", "--data", data, "--out", out]
    tiny = [*base, "--preset", "tiny"]
    assert "unknown preset 'clever'; choose one of birds, clevr, ier, spot, tiny" in refused(capsys, out, *base, "--preset", "clever")
    assert "preset 'clevr' starts from pretrained weights; give them with --init" in refused(capsys, out, *base)
    assert "no such data folder" in refused(capsys, out, "adapt", "--data", tmp_path / "no", "--out", out, "--preset", "tiny")
    assert "absent.pt: no such checkpoint" in refused(capsys, out, *base, "--init", tmp_path / "absent.pt")
    assert "intra_layers 5 lies outside the model; with 4 vision layers" in refused(capsys, out, *tiny, "--intra-layers", 5)
    assert "max_words 60 exceeds the model's 40 positions; lower --max-words" in refused(capsys, out, *tiny, "--max-words", 60)
    assert "fewer than one batch of 32; lower the batch size" in refused(capsys, out, *tiny)
    assert "--seed must lie in 0 to 2**63 - 1" in refused(capsys, out, *tiny, "--seed", 2**70)
    (tmp_path / "file").write_text("")
    blocked = ["adapt", "--data", data, "--preset", "tiny", "--batch-size", 4, "--out", tmp_path / "file" / "run"]
    assert "the run folder cannot be made" in refused(capsys, tmp_path / "nothing", *blocked)
    assert "--epochs must be at least 1, got 0" in refused(capsys, out, *tiny, "--epochs", 0)
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device; use --device cpu" in refused(capsys, out, *tiny, "--device", "cuda")
    assert "--size is '480'; write it as in --size 480x320" in refused(capsys, out, "render", "--out", out, "--scenes", 20, "--size", 480)
    assert "--objects is 'three'" in refused(capsys, out, "render", "--out", out, "--scenes", 20, "--objects", "three")


def test_a_broken_image_ends_the_run_with_its_name(tmp_path, capsys):
    """Found before the run starts where it is the first, and never with a half-written model."""
    data = worlds.clevr_tree(tmp_path / "data", SPLITS)
    flags = ["adapt", "--data", str(data), "--out", str(tmp_path / "run"), "--preset", "tiny", "--batch-size", "4", "--steps", "9"]
    (data / "images" / "CLEVR_default_000000.png").write_bytes(b"<html>")
    assert "CLEVR_default_000000.png: cannot be read as an image" in refused(capsys, tmp_path / "run", *flags)
    data = worlds.clevr_tree(tmp_path / "cut" / "data", SPLITS)
    last = data / "nsc_images" / "CLEVR_nonsemantic_000033.png"
    last.write_bytes(last.read_bytes()[:-20])
    flags[2] = str(data)
    assert "CLEVR_nonsemantic_000033.png: cannot be read as an image" in refused(capsys, tmp_path / "run", *flags), "a cut test image too"
    data = worlds.clevr_tree(tmp_path / "other" / "data", SPLITS)
    bad = data / "sc_images" / "CLEVR_semantic_000007.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:60] + bytes(40) + whole[100:])  # damaged inside: only decoding shows it
    flags[2] = str(data)
    assert main(flags) == 2
    assert "CLEVR_semantic_000007.png: cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--graph", "on"], "--graph on cannot be: on cpu there are no launches to save; leave it out."),
        (["--fp8", "--precision", "bf16"], "--fp8 cannot be: FP8 products need a CUDA device"),
    ],
)
def test_what_a_cpu_cannot_have(data, tmp_path, capsys, flags, sentence):
    line = ["adapt", "--data", str(data), "--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "run"), *flags]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten(data, adapted, tmp_path, capsys):
    flags = ["adapt", "--data", str(data), "--preset", "tiny", "--batch-size", "4", "--steps", "1"]
    before = (adapted / "model.safetensors").read_bytes()
    assert main([*flags, "--out", str(adapted)]) == 2
    assert "already exists and is not empty; choose another --out, or add --overwrite" in capsys.readouterr().err
    assert (adapted / "model.safetensors").read_bytes() == before
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    assert main([*flags, "--out", str(precious), "--overwrite"]) == 2
    assert "replaces a fastidc run, and this is none" in capsys.readouterr().err
    assert (precious / "chapter.txt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(data, adapted, tmp_path, capsys):
    model = CLIP4IDC.from_pretrained(adapted)
    weights = dict(model.named_parameters())
    weights["pair_encoder.projection"] = torch.full_like(weights["pair_encoder.projection"], float("nan"))
    checkpoint.save(tmp_path / "nan", model.config, weights, {"preset": "tiny"})
    flags = ["--data", str(data), "--init", str(tmp_path / "nan"), "--batch-size", "4", "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(["finetune", *flags]) == 2
    assert "the loss or its gradient is not finite at step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_api_raises_what_the_command_prints(data, tmp_path):
    with pytest.raises(ValueError, match="unknown precision 'fp8'; choose one of auto, bf16, fp16, fp32, fp16-official"):
        train("adapt", TrainOptions(data, tmp_path / "run", preset="tiny", precision="fp8"))


def test_help_and_unknown_commands():
    def run(*argv):
        return subprocess.run([sys.executable, "-m", "fastidc.cli", *argv], capture_output=True, text=True, timeout=120, check=False)

    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("render", "adapt", "finetune", "demo", "doctor"))
    unknown = run("fly")
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr


def test_doctor_says_what_serves_what(monkeypatch, tmp_path, capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for call in ("intra, 50 tokens", "packed captions", "ViT-B/16 inter, 394 tokens"):
        assert f"attention, {call}: sdpa" in said
    for line in ("CUDA graph of the step: off, on cpu there are no launches to save", "bf16 gradient buckets: off, there is one process"):
        assert said.count(line) == 2, "of both stages"
    assert said.count("adaptation has no captioner") == 1
    assert "never computed, whatever the device: the text tower; the before-image a second time" in said
    assert said.count("    xformers: it runs on CUDA, not on cpu.") == 1
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=xformers")
    assert main(["doctor"]) == 0
    assert "packed captions: none; backend 'xformers' cannot serve this attention call" in capsys.readouterr().out
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=xformer")
    for command in ("doctor",), ("adapt", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--preset", "tiny"):
        assert main(command) == 2
        refused = capsys.readouterr().err
        if command[0] == "doctor":
            assert refused.startswith("fastidc: FASTIDC_BACKEND: attention has no backend 'xformer'; choose one of auto")
        assert len(refused.splitlines()) == 1
        assert not (tmp_path / "run").exists()
