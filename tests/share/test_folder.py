"""`fastidc export`: a folder that loads as the run does, without what belongs to the machine, and a card whose every number is the run's."""

import json
import os
import shutil

import pytest
import torch

pytest.importorskip("yaml", reason="the card's front matter is read with PyYAML: install the package pyyaml")

import yaml
from describe.cases import image_pairs
from share.shared_runs import CAPTION_METRICS, FACTS, RETRIEVAL_METRICS, block, finished

from fastidc import CLIP4IDC, Describer
from fastidc.errors import FastidcError
from fastidc.share import card, export
from fastidc.share.folder import public_facts

CALIBRATION = {"scale": 2.0, "shift": 0.5, "split": "val", "pairs": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "run", calibration=CALIBRATION)


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "changes"
    export(run, folder, licence="cc-by-4.0", dataset="CLEVR-Change")
    return folder


def read_card(folder):
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_it_loads_as_the_run_does(run, out, tmp_path):
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors", "no_change.json"]
    ours, theirs = CLIP4IDC.from_pretrained(run), CLIP4IDC.from_pretrained(out)
    assert ours.config == theirs.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")
    pair = image_pairs(tmp_path, 1)[0]
    one, other = (Describer(model, "cpu")(*pair) for model in (run, out))
    assert (one.caption, one.p_change) == (other.caption, other.p_change)
    assert one.p_change is not None


def test_same_bytes(run, out, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(run, moved)
    again = tmp_path / "changes"
    export(moved, again, licence="cc-by-4.0", dataset="CLEVR-Change")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_no_path_of_the_machine(run, out):
    for name in ("config.json", "README.md"):
        text = (out / name).read_text()
        assert "secret" not in text
        assert str(run.parent) not in text
    config = json.loads((out / "config.json").read_text())
    assert config["run"]["init"] == "adapt"
    assert "data" not in config["run"]
    assert config["note"] == ["note.txt", "kept / as it is"]
    assert {key: config["run"][key] for key in ("steps", "device", "beams")} == {"steps": 600, "device": "cpu", "beams": 1}


@pytest.mark.parametrize(
    ("init", "kept"),
    [
        ("runs/adapt", "adapt"),
        ("runs\\adapt\\", "adapt"),
        ("C:\\models\\ViT-B-32.pt", "ViT-B-32.pt"),
        ("~/x/pytorch_model.bin.3", "pytorch_model.bin.3"),
        ("open_clip:ViT-B-32-quickgelu/openai", "open_clip:ViT-B-32-quickgelu/openai"),
        ("hub:me/changes@v1", "hub:me/changes@v1"),
        (None, None),
    ],
)
def test_what_it_started_from(init, kept):
    assert public_facts({"run": {"init": init}})["run"]["init"] == kept


def test_front_matter(out):
    front, text = read_card(out)
    assert front["license"] == "cc-by-4.0"
    assert (front["library_name"], front["pipeline_tag"], front["datasets"]) == ("fastidc", "image-to-text", ["clevr-change"])
    assert front["metrics"] == ["bleu", "cider", "meteor", "rouge"]
    (entry,) = front["model-index"]
    assert entry["name"] == "changes"
    (result,) = entry["results"]
    assert result["dataset"] == {"type": "clevr-change", "name": "CLEVR-Change", "split": "test"}
    found = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert found == {
        f"{name}{of}": value
        for name, value in (("BLEU-4", 50.0), ("METEOR", 25.0), ("ROUGE-L", 62.5), ("CIDEr", 123.4))
        for of in ("", " (change pairs)")
    }
    assert "licence of these weights was not stated" not in text


def test_the_hub_reads_it(out):
    hub = pytest.importorskip("huggingface_hub", reason="the Hub needs the package huggingface_hub: install fastidc[hub]")
    data = hub.ModelCard((out / "README.md").read_text()).data
    assert data.license == "cc-by-4.0"
    assert len(data.eval_results) == 8
    assert {(r.task_type, r.dataset_name) for r in data.eval_results} == {("image-to-text", "CLEVR-Change")}


def test_card_says_what_the_run_says(out):
    _, text = read_card(out)
    for row in (
        "| overall | 8 | 50.0 | 25.0 | 62.5 | 123.4 |",
        "| change pairs | 4 | 50.0 | 25.0 | 62.5 | 123.4 |",
        "| type: color | 1 | 50.0 | 25.0 | 62.5 | 123.4 |",
        "| type: move | 3 | 50.0 | 25.0 | 62.5 | 123.4 |",
        "| steps | 600 |",
        "| lr | 0.0001 |",
        "| kept epoch | 4, the best by CIDEr on val |",
        "| started from | `adapt` |",
    ):
        assert f"\n{row}\n" in text
    parameters = sum(p.numel() for p in CLIP4IDC.from_pretrained(out).parameters())
    assert f"| parameters | {parameters:,} (" in text
    assert "Measured by `fastidc finetune` on a CPU in fp32, 2 processes, PyTorch 2.10.0" in text
    assert "is calibrated on 8 pairs of the val split" in text
    assert "fastidc caption before.png after.png --model hub:OWNER/changes" in text
    assert "augment" not in text, "what was not set is not said"


def test_a_form_is_no_data_set(run, tmp_path):
    """`fastidc render` writes CLEVR-Change's files too: without being told, the card does not say that these were its images."""
    export(run, tmp_path / "x", licence="mit")
    front, text = read_card(tmp_path / "x")
    assert "datasets" not in front
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "data in the form of CLEVR-Change"
    assert "| data | data in the form of CLEVR-Change |" in text


def test_an_adapted_run(tmp_path):
    run = finished(tmp_path / "run", RETRIEVAL_METRICS, FACTS | {"stage": "adapt"}, captioner=False, sentences=None)
    export(run, tmp_path / "x", licence="mit")
    front, text = read_card(tmp_path / "x")
    assert "| sentence to pair | 12.5 | 50.0 | 75.0 | 5.0 | 7.2 |" in text
    assert "| pair to sentence | 25.0 | 50.0 | 75.0 | 5.0 | 7.2 |" in text
    assert "| sentence to pair, the official code's ties | 99.0 |" in text
    assert {m["name"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}["R@1 (pair to sentence)"] == 25.0
    assert "image-text-retrieval" in front["tags"]
    assert "fastidc finetune --data DATA --out runs/caption --init hub:OWNER/x" in text
    assert "Describer" not in text
    assert not (tmp_path / "x" / "no_change.json").exists()


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        (None, {"license": "unknown"}),
        ("MIT", {"license": "mit"}),
        ('Ours: "ask"\n us', {"license": "other", "license_name": 'Ours: "ask" us'}),
    ],
)
def test_licences(run, tmp_path, licence, front):
    done = export(run, tmp_path / "x", licence=licence)
    found, text = read_card(tmp_path / "x")
    assert {key: value for key, value in found.items() if key.startswith("license")} == front
    assert ("was not stated" in text) == (licence is None)
    assert bool([note for note in done.notes if 'given as "unknown"' in note]) == (licence is None)


def test_missing_scores_are_said(tmp_path):
    run = finished(tmp_path / "a", CAPTION_METRICS | {"splits": {"test": {"overall": block(4, meteor=None)}}}, sentences=None)
    export(run, tmp_path / "x", licence="mit")
    front, text = read_card(tmp_path / "x")
    assert "| overall | 4 | 50.0 | - | 62.5 | 123.4 |" in text
    assert "There is no METEOR: there is no Java." in text
    assert "meteor" not in front["metrics"]
    assert "It gives no probability of a change" in text
    done = export(finished(tmp_path / "b", None), tmp_path / "y", licence="mit")
    front, text = read_card(tmp_path / "y")
    assert "model-index" not in front
    assert "None: the run has no scores of a test split." in text
    assert done.notes == (f"{tmp_path / 'b'} has no metrics.json, so the card has no scores.",)


def test_a_run_that_says_little(tmp_path):
    """A folder that `fastidc convert` wrote has a model and no history."""
    run = finished(tmp_path / "run", None, {})
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({key: config[key] for key in ("format", "version", "model")}))
    export(run, tmp_path / "x", licence="mit")
    assert "| data | unknown |" in read_card(tmp_path / "x")[1]
    assert CLIP4IDC.from_pretrained(tmp_path / "x").captioner is not None


def test_refusals_leave_nothing(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "no_change.json").write_text('{"sentences": 3}')
    scores = tmp_path / "scores"
    shutil.copytree(run, scores)
    (scores / "metrics.json").write_text("[1")
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, out, options, sentence in (
        (tmp_path / "absent", "x", {}, "absent: no such run folder"),
        (run, "full", {"overwrite": True}, "full: holds thesis.txt, which no export writes"),
        (run, "file", {}, "file: is a file, and a fastidc checkpoint is a folder"),
        (run, "x", {"licence": " "}, "--licence is empty"),
        (run, "x", {"dataset": ""}, "--dataset is empty"),
        (damaged, "x", {}, "field 'sentences' must be a list"),
        (scores, "x", {}, "metrics.json: cannot be read as JSON"),
    ):
        with pytest.raises(FastidcError, match=sentence):
            export(source, tmp_path / out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_overwrite_replaces_whole_or_not_at_all(run, tmp_path, monkeypatch):
    export(run, tmp_path / "x", licence="mit")
    with pytest.raises(FastidcError, match="x: already exists; choose another DST, or add --overwrite"):
        export(run, tmp_path / "x")
    export(run, tmp_path / "x", licence="isc", overwrite=True)
    assert read_card(tmp_path / "x")[0]["license"] == "isc"
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(FastidcError, match=r"x cannot be written \(No space left on device\)"):
        export(run, tmp_path / "x", licence="mit", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_rows_of_the_card_are_what_they_are_called():
    block = lambda pairs, cider: {"pairs": pairs, "CIDEr": cider, "METEOR": None}  # noqa: E731
    rows = card._captions(
        {"overall": block(3, 0.5), "change": block(2, 0.25), "no_change": block(1, 0.75), "types": {"drop": block(2, 0.1)}}
    )
    shown = [(row["name"], row["pairs"], row["scores"]["CIDEr"], row["scores"]["METEOR"]) for row in rows]
    assert shown == [("overall", 3, 50, None), ("change pairs", 2, 25, None), ("no-change pairs", 1, 75, None), ("type: drop", 2, 10, None)]
