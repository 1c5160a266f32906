"""`python -m fastidc.train`: the official README's command lines, with paths, epochs and sizes changed."""

import json
import re
import shutil

import pytest
import torch
import worlds

from fastidc import checkpoint
from fastidc.data.records import load_records
from fastidc.evaluate.coco import read_results, write_references
from fastidc.evaluate.predict import references_of
from fastidc.train.examiner import Examiner
from fastidc.train.official import main

RETRIEVAL = """--do_train --num_thread_reader=4 --epochs=2 --batch_size=8 --n_display=3 --lr 1e-4 --max_words 32 --batch_size_val 128
    --datatype clevr --coef_lr 1e-3 --freeze_layer_num 0 --linear_patch 2d --intra_num_hidden_layers 2 --device cpu"""
CAPTION = """--do_train --num_thread_reader=4 --epochs=2 --batch_size=8 --n_display=2 --lr 1e-4 --max_words 32 --batch_size_val 64
    --datatype clevr --coef_lr 1e-3 --freeze_layer_num 0 --linear_patch 2d --intra_num_hidden_layers 2 --pretrained_clip_name ViT-B/32
    --seed 2021 --device cpu"""


def retrieval(data, out, clip, *flags):
    paths = ["--data_path", data, "--features_path", data, "--output_dir", out, "--pretrained_clip_name", clip]
    return main([*RETRIEVAL.split(), *map(str, (*paths, *flags))])


def caption(data, out, init, *flags):
    paths = ["--data_path", data, "--features_path", data, "--output_dir", out, *(() if init is None else ("--init_model", init))]
    return main([*CAPTION.split(), *map(str, (*paths, *flags))])


@pytest.fixture(scope="module")
def adapted(clevr, clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "ckpt_clevr_retrieval"
    assert retrieval(clevr, out, clip) == 0
    return out


def log_of(out):
    return (out / "log.txt").read_text()


def test_retrieval_leaves_the_official_files_and_lines(adapted, clip):
    names = {path.name for path in adapted.iterdir()}
    assert {"log.txt", "pytorch_model.bin.0", "pytorch_model.bin.1", "pytorch_opt.bin.0", "pytorch_opt.bin.1", "metrics.json"} <= names
    log = log_of(adapted)
    stamp = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}:INFO: "
    for line in (
        r"Effective parameters:",
        r"  <<< batch_size: 8",
        r"device: cpu n_gpu: 0",
        r"\*\*\*\*\* Running test \*\*\*\*\*",
        r"\*\*\*\*\* Running training \*\*\*\*\*",
        r"  Num examples = \d+",
        r"Epoch: 1/2, Step: 3/\d+, Lr: \d\.\d{9}-\d\.\d{9}, Loss: \d+\.\d{6}, Time/step: \d+\.\d{6}",
        r"Epoch 2/2 Finished, Train Loss: \d+\.\d{6}",
        rf"Model saved to {re.escape(str(adapted))}/pytorch_model\.bin\.1",
        rf"Optimizer saved to {re.escape(str(adapted))}/pytorch_opt\.bin\.1",
        r"Text-to-Image-Pair:",
        r"\t>>>  R@1: \d+\.\d - R@5: \d+\.\d - R@10: \d+\.\d - Median R: \d+\.\d - Mean R: \d+\.\d",
        r"\t>>>  V2T\$R@1: \d+\.\d - V2T\$R@5: \d+\.\d - V2T\$R@10: \d+\.\d - V2T\$Median R: \d+\.\d - V2T\$Mean R: \d+\.\d",
        rf"The best model is: {re.escape(str(adapted))}/pytorch_model\.bin\.\d, the R1 is: \d+\.\d{{4}}",
    ):
        assert re.search(stamp + line + "$", log, re.MULTILINE), line
    state = torch.load(adapted / "pytorch_model.bin.1", weights_only=True)
    given = torch.load(clip, weights_only=True)
    new = {f"clip.visual.{n}" for n in ("joint_positional_embedding", "bef_embedding", "aft_embedding", "ln_mid.weight", "ln_mid.bias")}
    assert set(state) == {f"clip.{key}" for key in given} | new
    assert torch.equal(state["clip.visual.conv1.weight"], given["visual.conv1.weight"]), "freeze_layer_num 0 freezes the stem"
    assert not torch.equal(state["clip.visual.proj"], given["visual.proj"])
    metrics = json.loads((adapted / "metrics.json").read_text())
    assert {"R@1", "R@10", "R@20", "R@50"} <= set(metrics["splits"]["test"]["legacy"]["text_to_pair"])
    assert set(metrics["splits"]["test"]) == {"legacy", "strict"}
    assert "paper" in log


def test_captioning_leaves_the_official_files_and_lines(clevr, adapted, tmp_path, capsys):
    """With METEOR and with the references of a COCO file, whose change captions are not those of the annotations."""
    records = load_records(clevr)
    gt = tmp_path / "gt"
    gt.mkdir()
    everything = references_of([record for split in records.values() for record in split])
    write_references(gt / "clevr_total_change_captions_reformat.json", everything)
    out = tmp_path / "ckpt_clevr_caption"
    assert (
        caption(clevr, out, adapted / "pytorch_model.bin.1", "--epochs", 1, "--gt_dir", gt, "--fp16", "--margin", 0.2, "--tensorboard") == 0
    )
    log = log_of(out)
    assert "task_type: caption (because --gt_dir is given)" in log
    assert "without effect, as in the official code: --margin, --fp16" in log
    assert re.search(r">>>  BLEU_1: \d\.\d{4}, BLEU_2: \d\.\d{4}, BLEU_3: \d\.\d{4}, BLEU_4: \d\.\d{4}$", log, re.MULTILINE)
    assert re.search(r">>>  METEOR: (\d\.\d{4}|none), ROUGE_L: \d\.\d{4}, CIDEr: \d\.\d{4}$", log, re.MULTILINE)
    assert log.count("Epoch 1 on val, all scores:") == 1, "METEOR of an epoch comes when it is done, beside what goes on"
    assert re.search(r"the CIDEr is: \d\.\d{4}$", log, re.MULTILINE)
    hypotheses = json.loads((out / "hyp_ep_0.json").read_text())
    assert [set(entry) for entry in hypotheses] == [{"image_id", "caption"}] * (2 * len(records["val"]))
    names = [entry["image_id"] for entry in hypotheses]
    assert names == [record.id for record in records["val"]] + [record.no_change_id for record in records["val"]], "change results first"
    assert set(read_results(out / "hyp_ep_eval.json")) == set(references_of(records["test"]))
    state = torch.load(out / "pytorch_model.bin.0", weights_only=True)
    alias = state["decoder.embeddings.word_embeddings.weight"]
    assert alias.data_ptr() == state["clip.token_embedding.weight"].data_ptr(), "stored once, as officially"
    assert list((out / "tensorboard").iterdir())
    # the saved model evaluates to the figures of the run
    again = tmp_path / "eval"
    capsys.readouterr()
    assert main(["--do_eval", "--data_path", str(clevr), "--datatype", "clevr", "--init_model", str(out / "pytorch_model.bin.0"), "--gt_dir", str(gt),
                 "--output_dir", str(again), "--intra_num_hidden_layers", "2", "--device", "cpu", "--batch_size_val", "3"]) == 0  # fmt: skip
    assert read_results(again / "hyp_ep_eval.json") == read_results(out / "hyp_ep_eval.json")


def spot(root):
    def entries(first, count):
        return [(str(i), [f"the person {i} has moved to the left", "a car is gone"]) for i in range(first, first + count)]

    worlds.spot_tree(
        root, {"train": entries(0, 20), "val": entries(40, 6), "test": [*entries(60, 6), ("60", ["", "one more person"])]}, "reformat_"
    )
    (root / "resized_images").rename(root / "images")
    return root


@pytest.mark.usefixtures("no_meteor")
def test_spot_the_diff(tmp_path, clip):
    """The official Spot lines; captioning through what the official README wrongly calls the retrieval script."""
    data = spot(tmp_path / "spot-the-diff")
    common = ["--datatype", "spot", "--features_path", data / "images", "--epochs", "1"]
    first = tmp_path / "ckpt_spot_retrieval"
    assert retrieval(data, first, clip, *common) == 0
    log = log_of(first)
    assert re.search(r"\t>>>  R@10: \d+\.\d - R@20: \d+\.\d - R@50: \d+\.\d$", log, re.MULTILINE), "the paper's columns for Spot-the-Diff"
    assert "  Num examples = 14" in log, "sentences of the test split, the empty one kept as officially"
    second = tmp_path / "ckpt_spot_caption"
    assert caption(data, second, first / "pytorch_model.bin.0", *common) == 0
    before, after = (torch.load(path / "pytorch_model.bin.0", weights_only=True) for path in (first, second))
    assert not torch.equal(before["clip.token_embedding.weight"], after["clip.token_embedding.weight"]), "Spot trains the tied word table"
    assert set(read_results(second / "hyp_ep_eval.json")) == {f"{i}.png" for i in range(60, 66)}


@pytest.mark.usefixtures("no_meteor")
def test_resuming_ends_bitwise_where_an_unbroken_run_ends(clevr, adapted, tmp_path):
    """Dropout, captions and order included."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    init = adapted / "pytorch_model.bin.1"
    assert caption(clevr, whole, init, "--epochs", 3) == 0
    assert caption(clevr, broken, None, "--epochs", 3, "--resume_model", whole / "pytorch_opt.bin.0") == 0, (
        "model and task are found beside it"
    )
    for name in ("pytorch_model.bin.2", "pytorch_opt.bin.2", "hyp_ep_2.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert not (broken / "pytorch_model.bin.0").exists()
    scores = [json.loads((folder / "selection.json").read_text())["epochs"] for folder in (whole, broken)]
    assert [(e["epoch"], e["score"]) for e in scores[0]] == [(e["epoch"], e["score"]) for e in scores[1]]
    steps = [[json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, broken)]
    assert steps[1] == steps[0][len(steps[0]) // 3 :]


def test_early_stopping_and_selection(clevr, adapted, tmp_path, monkeypatch):
    """Ten epochs in a row may be worse, the eleventh ends it; a later epoch wins ties; the best one is what the test split sees."""
    seen = []
    monkeypatch.setattr(Examiner, "epoch", lambda self, epoch, split: seen.append(split) or (0.5 if epoch in (1, 2) else 0.1))
    finals = []
    monkeypatch.setattr(Examiner, "final", lambda self, name: finals.append(self.judge.model.captioner.head.bias.detach().clone()))
    out = tmp_path / "run"
    assert caption(clevr, out, adapted / "pytorch_model.bin.1", "--epochs", 30, "--select", "test") == 0
    assert seen == ["test"] * (3 + 11)
    assert "The best model is: " + str(out / "pytorch_model.bin.2") in log_of(out).splitlines()[-1]
    best = torch.load(out / "pytorch_model.bin.2", weights_only=True)["decoder.classifier.cls.predictions.transform.dense.bias"]
    assert torch.equal(finals[0], best)


@pytest.mark.parametrize("precision", ["fp16-official", "fp16", "bf16"])
def test_precisions_through_the_script(clevr, clip, tmp_path, precision):
    out = tmp_path / "run"
    assert retrieval(clevr, out, clip, "--epochs", 1, "--precision", precision) == 0
    state = torch.load(out / "pytorch_model.bin.0", weights_only=True)
    half = {key for key, value in state.items() if value.dtype == torch.float16}
    if precision == "fp16-official":
        assert half == {key for key in state if checkpoint.is_half_officially(checkpoint.our_name(key)[0])}
        assert "--coef_lr 0.03" not in log_of(out)
    else:
        assert not half, "masters are fp32"
        assert "--coef_lr 0.03" in log_of(out)


def test_accumulation_takes_the_same_samples(clevr, adapted, tmp_path, no_meteor):
    """Captioning without dropout: two passes of four are one of eight, but for each pass having its own token mean."""
    decoder = worlds.decoder_folder(tmp_path / "decoder", dropout=0.0)
    losses = []
    for name, flags in (("one", []), ("two", ["--gradient_accumulation_steps", "2"])):
        init = adapted / "pytorch_model.bin.1"
        assert caption(clevr, tmp_path / name, init, "--epochs", 1, "--decoder_model", decoder, *flags) == 0
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def refused(capsys, out, run, *args):
    capsys.readouterr()
    assert run(*args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastidc.train: ")
    assert not out.exists(), "something was written"
    return error


def test_refusals(clevr, clip, adapted, tmp_path, capsys):
    out = tmp_path / "run"
    init = adapted / "pytorch_model.bin.1"
    ask = lambda *flags: refused(capsys, out, retrieval, clevr, out, clip, *flags)  # noqa: E731
    assert "9" in (error := ask("--batch_size", 9, "--gradient_accumulation_steps", 2))
    assert "cannot be shared out evenly" in error
    assert "no such folder; CLEVR-Change keeps its images in" in refused(capsys, out, retrieval, tmp_path, out, clip)
    assert f"{tmp_path / 'absent.pt'}: no such file, and not a published ViT CLIP" in ask("--pretrained_clip_name", tmp_path / "absent.pt")
    assert "intra_layers 9 lies outside the model" in ask("--intra_num_hidden_layers", 9)
    assert "exceeds the model's 40 positions" in ask("--max_words", 50)
    assert "lower the batch size" in ask("--batch_size", 4096)
    assert "belongs to another task" in ask("--resume_model", adapted / "pytorch_opt.bin.0", "--task_type", "caption")
    assert "not a pytorch_opt.bin.* of this script" in ask("--resume_model", init)
    assert "cannot be read as an optimiser's state" in ask("--resume_model", clevr / "splits.json")
    assert "epoch 2 of 2 is done; give more --epochs" in refused(
        capsys, out, retrieval, clevr, out, clip, "--resume_model", adapted / "pytorch_opt.bin.1"
    )
    line = ["--resume_model", adapted / "pytorch_opt.bin.0", "--epochs", 3]
    assert "does not belong to the weights in" in ask(*line, "--init_model", init)
    assert "batch_size 8, and this one has 4; resume with --batch_size 8" in ask(*line, "--batch_size", 4)
    assert "precision fp32, and this one has fp16-official" in ask(*line, "--precision", "fp16-official")
    assert "seed 42, and this one has 7" in ask(*line, "--seed", 7)
    assert "grouped otherwise" in ask("--resume_model", adapted / "pytorch_opt.bin.0", "--freeze_layer_num", 1)
    assert "--freeze_layer_num 99 exceeds the model's 3 layers" in ask("--freeze_layer_num", 99)
    assert "--graph on cannot be: on cpu" in ask("--graph", "on")
    assert "--fp8 cannot be: FP8 products need a CUDA device" in ask("--fp8", "--precision", "bf16")
    evaluate = ["--do_eval", "--data_path", str(clevr), "--output_dir", str(out), "--intra_num_hidden_layers", "2", "--device", "cpu"]
    assert "holds no captioner" in refused(capsys, out, main, [*evaluate, "--task_type", "caption", "--init_model", str(init)])
    assert "is a CLIP that never saw a pair" in refused(capsys, out, main, [*evaluate, "--init_model", str(clip)])
    no_gt = refused(capsys, out, caption, clevr, out, init, "--gt_dir", tmp_path)
    assert "clevr_total_change_captions_reformat.json: no such file" in no_gt
    gt = tmp_path / "gt"
    gt.mkdir()
    references = references_of(load_records(clevr)["val"])
    write_references(gt / "clevr_total_change_captions_reformat.json", dict(list(references.items())[1:]))
    missing = next(iter(references))
    assert f"no annotation has image_id {missing!r}" in refused(capsys, out, caption, clevr, out, init, "--gt_dir", gt)
    other = tmp_path / "other" / "data"
    shutil.copytree(clevr, other)
    splits = json.loads((other / "splits.json").read_text())
    (other / "splits.json").write_text(json.dumps(splits | {"train": splits["train"] + splits["val"], "val": []}))
    assert "the val split is empty; select epochs with --select test" in refused(capsys, out, retrieval, other, out, clip)
    (tmp_path / "spot" / "images").mkdir(parents=True)
    mixed = refused(capsys, out, retrieval, tmp_path / "spot", out, clip, "--datatype", "auto")
    assert "--datatype" in mixed
    decoder = worlds.decoder_folder(tmp_path / "decoder", dropout=2.0)
    assert "hidden_dropout_prob must be a number in [0, 1), got 2.0" in refused(
        capsys, out, caption, clevr, out, init, "--decoder_model", decoder
    )


def damaged(path, out, change):
    """A copy of a pytorch_opt.bin.0 with its model beside it, its contents changed."""
    out.mkdir()
    shutil.copy(path.with_name("pytorch_model.bin.0"), out)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, out / "pytorch_opt.bin.0")
    return out / "pytorch_opt.bin.0"


def moments(state):
    return state["optimizer_state_dict"]["inner"][0]["state"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.update(epoch="a"), "field epoch is a str, a int was expected"),
        (lambda state: state["optimizer_state_dict"].update(steps="a"), "its number of steps is 'a'"),
        (lambda state: moments(state).pop(3), "the moments of"),
        (lambda state: moments(state)[2].update(first_moment=torch.zeros(3, 3, 3)), "has shape [3, 3, 3], the parameter"),
        (lambda state: state.pop("run"), "not a pytorch_opt.bin.* of this script"),
    ],
)
def test_a_damaged_optimiser_state_is_a_sentence(clevr, clip, adapted, tmp_path, capsys, change, sentence):
    path = damaged(adapted / "pytorch_opt.bin.0", tmp_path / "damaged", change)
    assert sentence in refused(capsys, tmp_path / "run", retrieval, clevr, tmp_path / "run", clip, "--resume_model", path)


@pytest.mark.parametrize(("entry", "sentence"), [({"epoch": "a"}, "epochs[0] must have"), (3, "epochs[0] must have")])
def test_damaged_scores_are_a_sentence(clevr, clip, adapted, tmp_path, capsys, entry, sentence):
    path = damaged(adapted / "pytorch_opt.bin.0", tmp_path / "damaged", lambda state: None)
    (tmp_path / "damaged" / "selection.json").write_text(json.dumps({"split": "val", "epochs": [entry]}))
    assert sentence in refused(capsys, tmp_path / "run", retrieval, clevr, tmp_path / "run", clip, "--resume_model", path)


def test_a_log_that_a_kill_cut_short_goes_on_without_repeating(clevr, clip, adapted, tmp_path):
    """Steps after the checkpoint are of the past that did not happen; so is half a line."""
    out = tmp_path / "run"
    shutil.copytree(adapted, out)
    whole = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("\n".join(whole[:-2]) + "\n" + whole[-2][:20])
    assert retrieval(clevr, out, clip, "--resume_model", out / "pytorch_opt.bin.0") == 0
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(whole) + 1))
    assert (out / "pytorch_model.bin.1").read_bytes() == (adapted / "pytorch_model.bin.1").read_bytes()


@pytest.mark.parametrize("name", ["log.jsonl", "tensorboard"])
def test_a_file_or_folder_in_the_way_is_a_sentence(clevr, clip, tmp_path, capsys, name):
    out = tmp_path / "run"
    out.mkdir()
    if name == "tensorboard":
        (out / name).write_text("")
    else:
        (out / name).mkdir()
    assert retrieval(clevr, out, clip, "--tensorboard") == 2
    assert str(out / name) in capsys.readouterr().err.strip().splitlines()[-1]


def test_processes_without_torchrun_are_a_sentence(clevr, clip, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start the processes with torchrun" in refused(capsys, tmp_path / "run", retrieval, clevr, tmp_path / "run", clip)
