"""A newcomer's own table of pairs, through both commands; flags of the command line that reach training."""

import json

import pytest
import worlds

from fastidc import checkpoint
from fastidc.cli import main

pytestmark = pytest.mark.usefixtures("module_without_java")
TINY = ["--steps", "3", "--batch-size", "4", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twenty pairs, two sentences for some, no ids, no splits."""
    root = tmp_path_factory.mktemp("own")
    lines = ["before,after,caption"]
    for i in range(20):
        for side in "ab":
            worlds.noise_image(root / "photos" / f"{i:02d}{side}.jpg")
        lines += [f"photos/{i:02d}a.jpg,photos/{i:02d}b.jpg,the {thing} is gone" for thing in ("lamp", "red chair")[: 1 + i % 2]]
    (root / "pairs.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n")  # as Excel saves it
    return root / "pairs.csv"


def test_twenty_pairs_to_captions(pairs, tmp_path, capsys):
    first, second = tmp_path / "adapt", tmp_path / "caption"
    assert main(["adapt", "--data", str(pairs), "--out", str(first), "--preset", "tiny", *TINY]) == 0
    shown = capsys.readouterr().out
    assert "16 train, 2 val, 2 test" in shown, "a split that was drawn is said"
    assert "legacy" in shown
    assert main(["finetune", "--data", str(pairs), "--out", str(second), "--init", str(first), *TINY, "--select", "test"]) == 0
    assert str(second / "hyp_test.json") in capsys.readouterr().out
    captions = json.loads((second / "hyp_test.json").read_text())
    assert len(captions) == 2
    metrics = json.loads((second / "metrics.json").read_text())
    assert metrics["selected"]["split"] == "test"
    assert metrics["dataset"] == "table"


def test_options_reach_the_run(pairs, tmp_path):
    out = tmp_path / "run"
    flags = [
        "--preset",
        "tiny",
        "--lr",
        "0.005",
        "--coef-lr",
        "0.25",
        "--freeze-layers",
        "1",
        "--accumulate",
        "2",
        "--gather-grad",
        "local",
    ]
    assert main(["adapt", "--data", str(pairs), "--out", str(out), *TINY, *flags, "--tensorboard", "--select", "val"]) == 0
    config = checkpoint.read_config(out)
    recipe = config["recipe"]
    found = {name: recipe[name] for name in ("lr", "coef_lr", "freeze_layers", "accumulate", "gather_grad", "select")}
    assert found == {"lr": 0.005, "coef_lr": 0.25, "freeze_layers": 1, "accumulate": 2, "gather_grad": "local", "select": "val"}
    assert list((out / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda text: text.replace("caption", "sentence", 1), "sentence"),
        (lambda text: text.replace("photos/07b.jpg", "photos/77b.jpg", 1), "photos/77b.jpg"),
        (lambda text: text.replace(",the lamp is gone", ",the lamp is gone,really", 1), "line 2"),
    ],
)
def test_a_wrong_table_is_a_sentence_with_file_and_line(pairs, tmp_path, capsys, edit, sentence):
    bad = pairs.with_name(f"{tmp_path.name}.csv")
    bad.write_text(edit(pairs.read_text()))
    assert main(["adapt", "--data", str(bad), "--out", str(tmp_path / "run"), "--preset", "tiny", *TINY]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastidc: ")
    assert str(bad) in error
    assert "line" in error
    assert sentence in error
    assert not (tmp_path / "run").exists()
