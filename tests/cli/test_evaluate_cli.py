"""`fastidc evaluate`: files as they come, every known fault of pycocoevalcap's drivers at once, and whole runs judged again."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import worlds

pytest.importorskip("pycocoevalcap", reason="caption scores need pycocoevalcap: install it")

from fastidc.cli import main
from fastidc.evaluate.coco import write_references, write_results
from fastidc.evaluate.retrieval import retrieval_metrics

# By pycocoevalcap's own driver for METEOR and classes for the rest, on the sentences without their control characters.
CLEAN = {
    "1.png": (["the red cube moved", "the red block is in another place"], "the red cube has moved"),
    "2.png": (["the ball is gone", ""], ""),
    "3": (["a small cyan ball appeared", "someone added a ball"], "a cyan ball appeared"),
    "3.png_n": (["there is no change", "nothing has changed"], "nothing has changed"),
    "5.png_n": (["the scene is the same as before"], "the scenes are identical"),
}
GOLDEN_METEOR = 0.3305655801640167
MARKS = ["\r", "\u2028", "\x0c", "\x0b", "\x85", "\x1c", "\x1d", "\x1e", "\n", "\u2029"]


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


def scores(*arguments, out):
    assert run(*arguments, "--json", out) == 0
    return json.loads(Path(out).read_text())


@pytest.fixture
def files(tmp_path):
    references = write_references(tmp_path / "gt.json", {pair: texts for pair, (texts, _) in CLEAN.items()})
    return references, write_results(tmp_path / "hyp.json", {pair: caption for pair, (_, caption) in CLEAN.items()})


def torn(folder):
    """The same sentences as files that nobody would wish for: control characters, numbers for ids, images and captions listed twice."""
    marks = iter(MARKS * 10)
    tear = lambda text: text.replace(" ", next(marks), 1).replace(" ", next(marks), 1)  # noqa: E731
    name = lambda pair: int(pair) if pair.isdigit() else pair  # noqa: E731
    images = [{"id": name(pair)} for pair in CLEAN] * 2
    annotations = [{"image_id": name(pair), "caption": tear(text)} for pair, (texts, _) in CLEAN.items() for text in texts]
    captions = [{"image_id": name(pair), "caption": tear(text)} for pair, (_, text) in reversed(CLEAN.items())]
    folder.mkdir()
    (folder / "gt.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8-sig")
    (folder / "hyp.json").write_text(json.dumps([*captions, captions[1]]))
    return folder / "gt.json", folder / "hyp.json"


def test_every_fault_at_once_bends_no_number(tmp_path, monkeypatch, capfd):
    import shutil

    import pycocoevalcap
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if shutil.which("java") is None:
        pytest.skip("there is no java on PATH: install a Java runtime (apt-get install default-jre-headless)")

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    package = Path(next(iter(pycocoevalcap.__path__)))
    before = sorted(path for path in package.rglob("*") if "__pycache__" not in path.parts)
    references, predictions = torn(tmp_path / "with blank")
    table = tmp_path / "with blank" / "each.csv"
    found = scores(
        "captions", "--references", references, "--predictions", predictions, "--csv", table, out=tmp_path / "with blank" / "o.json"
    )
    gts = {pair: texts for pair, (texts, _) in CLEAN.items()}
    res = {pair: [caption] for pair, (_, caption) in CLEAN.items()}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    expected = {f"Bleu_{n}": value for n, value in enumerate(bleu, 1)}
    expected |= {"ROUGE_L": Rouge().compute_score(gts, res)[0], "CIDEr": Cider().compute_score(gts, res)[0]}
    assert {name: found["overall"][name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found["overall"]["METEOR"] == pytest.approx(GOLDEN_METEOR, abs=1e-9)
    assert found["overall"]["intervals"]["METEOR"][0] < GOLDEN_METEOR < found["overall"]["intervals"]["METEOR"][1]
    assert (found["tokenizer"], found["overall"]["pairs"], found["change"]["pairs"]) == ("ptb-java", 5, 3)
    assert "'2.png'" in found["warnings"][0]
    assert len(found["warnings"]) == 2
    assert len(table.read_bytes().splitlines()) >= 6
    assert sorted(path for path in package.rglob("*") if "__pycache__" not in path.parts) == before
    shown = capfd.readouterr()
    assert "fastidc: 1 id ('2.png') with an empty reference" in shown.err
    assert "constant caption" in shown.out


def test_a_nul_shifts_nobody_and_without_java_meteor_is_null(files, tmp_path, no_java, capsys):
    references, predictions = files
    plain = scores("captions", "--references", references, "--predictions", predictions, out=tmp_path / "a.json")
    assert plain["overall"]["METEOR"] is None
    assert "no java on PATH" in plain["reasons"]["METEOR"]
    assert plain["tokenizer"] == "ptb-regex"
    assert "METEOR -: there is no java on PATH" in capsys.readouterr().out
    captions = json.loads(predictions.read_text())
    captions[0]["caption"] = "the red\x00 cube has moved"
    predictions.write_text(json.dumps(captions))
    nul = scores("captions", "--references", references, "--predictions", predictions, out=tmp_path / "b.json")
    assert nul["no_change"] == plain["no_change"]


def test_types_and_bins_have_rows(files, tmp_path, no_java, capsys):
    types, iou = tmp_path / "types.json", tmp_path / "iou.json"
    types.write_text('{"move": ["1.png"], "drop": ["2.png"], "add": ["3"]}')
    iou.write_text('{"1": "0.1", "2": "0.5", "3": "0.55"}')
    flags = ["--references", files[0], "--predictions", files[1], "--types", types, "--iou", iou]
    found = scores("captions", *flags, out=tmp_path / "o.json")
    assert list(found["types"]) == ["add", "drop", "move"]
    assert {name: block["pairs"] for name, block in found["iou"].items()} == {"0.0-0.2": 1, "0.4-0.6": 2}
    assert "  IoU 0.4-0.6" in capsys.readouterr().out
    for file, flag in ((types, "--types"), (iou, "--iou")):
        file.write_text('{"77": ["none"]}' if flag == "--types" else '{"77": 0.5}')
        assert run("captions", "--references", files[0], "--predictions", files[1], flag, file) == 2
        assert f"{file}: names none of the" in capsys.readouterr().err


def test_ids_that_do_not_match_are_listed(files, no_java, capsys):
    references, predictions = files
    captions = json.loads(predictions.read_text())
    predictions.write_text(json.dumps([*captions[1:], {"image_id": "x.png", "caption": "a"}]))
    flags = ["captions", "--references", references, "--predictions", predictions]
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert "1 id ('1.png') without a caption and 1 id ('x.png') without references" in error
    assert error.count("\n") == 1
    assert run(*flags, "--subset") == 0
    shown = capsys.readouterr()
    assert "the 4 ids in both are scored" in shown.err
    assert shown.out.splitlines()[2].split()[:2] == ["overall", "4"]


def test_two_captions_for_one_pair_are_an_error(files, no_java, capsys):
    captions = json.loads(files[1].read_text())
    files[1].write_text(json.dumps([*captions, {"image_id": "1.png", "caption": "another"}]))
    assert run("captions", "--references", files[0], "--predictions", files[1]) == 2
    assert "[5].image_id '1.png' occurs twice with different captions" in capsys.readouterr().err


def test_what_cannot_be_written_or_drawn_is_said(files, tmp_path, no_java, capsys):
    flags = ["captions", "--references", files[0], "--predictions", files[1]]
    (tmp_path / "file").write_text("")
    assert run(*flags, "--json", tmp_path / "file" / "o.json") == 2
    assert "o.json cannot be written" in capsys.readouterr().err
    assert run(*flags, "--resamples", "-1") == 2
    assert "--resamples must be at least 0" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gt.json", "hyp.json"]


def test_retrieval_of_a_matrix(tmp_path, capsys):
    rng = np.random.default_rng(0)
    similarity, owner = rng.normal(size=(20, 10)).round(1), np.arange(20) // 2
    np.savez(tmp_path / "s.npz", similarity=similarity, text_to_pair=owner)
    found = scores("retrieval", "--similarity", tmp_path / "s.npz", out=tmp_path / "o.json")
    for ties in ("strict", "legacy"):
        plain = retrieval_metrics(similarity, owner, ties=ties, ks=(1, 5, 10, 20, 50))
        for direction in ("text_to_pair", "pair_to_text"):
            assert {name: found[ties][direction][name] for name in plain[direction]} == plain[direction]
            assert len(found[ties][direction]["intervals"]["MdR"]) == 2
    capsys.readouterr()
    assert run("retrieval", "--similarity", tmp_path / "s.npz", "--ties", "legacy") == 0
    assert "strict" not in capsys.readouterr().out
    assert run("retrieval") == 2
    assert run("retrieval", "--similarity", "x.npy", "--run", "y") == 2
    assert capsys.readouterr().err.count("give exactly one of them") == 2


@pytest.mark.parametrize("command", ["captions", "retrieval", "run"])
def test_help_fits_a_screen_and_has_an_example(command):
    code = f"import sys; from fastidc.cli import main; sys.exit(main(['evaluate', '{command}', '--help']))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"COLUMNS": "80", "PYTHONPATH": ":".join(sys.path)}
    )
    lines = shown.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert f"Example: fastidc evaluate {command}" in shown.stdout


SPLITS = {"train": list(range(8)), "val": [20, 21], "test": [30, 31, 32, 33]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(data, adapted run, fine-tuned run), two steps each."""
    pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")
    root = tmp_path_factory.mktemp("runs")
    data = worlds.clevr_tree(root / "data", SPLITS)
    (data / "change_captions_by_IOU.json").write_text(json.dumps({str(n): "0.5" for n in SPLITS["test"]}))
    small = ["--data", str(data), "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    patch = pytest.MonkeyPatch()
    patch.setenv("PATH", "")
    assert main(["adapt", *small, "--preset", "tiny", "--out", str(root / "adapt")]) == 0
    assert main(["finetune", *small, "--init", str(root / "adapt"), "--out", str(root / "tuned")]) == 0
    patch.undo()
    return data, root / "adapt", root / "tuned"


def test_an_adapted_run_has_its_metrics(runs, tmp_path, capsys):
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    by_run = scores("run", runs[1], "--device", "cpu", out=tmp_path / "o.json")
    by_retrieval = scores("retrieval", "--run", runs[1], "--device", "cpu", out=tmp_path / "p.json")
    assert "CLEVR-Change: retrieval, recall in %" in capsys.readouterr().out
    for direction in ("text_to_pair", "pair_to_text"):
        assert by_run["strict"][direction] == by_retrieval["strict"][direction]
        for ties, expected in (("strict", metrics["splits"]["test"]), ("legacy", metrics["legacy_ties"]["test"])):
            assert {name: by_run[ties][direction][name] for name in expected[direction]} == pytest.approx(expected[direction])
    assert run("run", runs[1], "--beams", "2") == 2
    assert "has no captions" in capsys.readouterr().err


def test_a_finetuned_run_is_scored_from_its_files_and_again(runs, tmp_path, no_java, capsys):
    data, _, tuned = runs
    metrics = json.loads((tuned / "metrics.json").read_text())["splits"]["test"]
    (tuned / "change_test.json").write_text(json.dumps({"a.png": 0.9, "b.png": 0.6, "a.png_n": 0.7, "b.png_n": 0.1}))
    (tuned / "change_val.json").write_text(json.dumps({"c.png": 0.8, "c.png_n": 0.7}))
    written = scores("run", tuned, out=tmp_path / "o.json")
    again = scores("run", tuned, "--data", data, "--device", "cpu", out=tmp_path / "p.json")
    for block in ("overall", "change", "no_change"):
        for ours, theirs in (("Bleu_4", "BLEU-4"), ("ROUGE_L", "ROUGE-L"), ("CIDEr", "CIDEr")):
            assert written[block][ours] == again[block][ours] == pytest.approx(metrics[block][theirs], abs=1e-9)
    assert again["captions"] == "made again"
    assert written["types"].keys() == {"color"}
    assert written["iou"]["0.4-0.6"]["pairs"] == 4
    assert written["change_accuracy"]["pairs"] == 8
    assert written["type_accuracy"]["pairs"] == 4
    assert written["change_probability"]["auc"] == 0.75
    assert "calibrated_error" in written["change_probability"]
    shown = capsys.readouterr().out
    for text in ("tells change from no change", "tells the type of change", "p(change): AUC 0.7500", "as the paper's Table 1"):
        assert shown.count(text) == 2
    beams = scores("run", tuned, "--beams", "2", "--split", "val", "--device", "cpu", "--resamples", "0", out=tmp_path / "q.json")
    assert beams["overall"]["pairs"] == 4
    assert "intervals" not in beams["overall"]


def test_a_run_without_its_data_or_no_run_at_all(runs, tmp_path, no_java, capsys):
    data, adapted, tuned = runs
    moved = data.rename(data.with_name("moved"))
    try:
        assert run("run", tuned, "--resamples", "0") == 0  # its files are enough
        assert "is not there, so pairs have no types" in capsys.readouterr().err
        assert run("run", adapted) == 2
        assert "say with --data where they are" in capsys.readouterr().err
    finally:
        moved.rename(data)
    assert run("run", tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tuned / "change_test.json").write_text('{"a.png": 2}')
    assert run("run", tuned) == 2
    assert "change_test.json: 'a.png' is 2" in capsys.readouterr().err
    (tuned / "change_test.json").unlink()
