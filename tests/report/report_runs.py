"""Run folders as `fastidc adapt` and `fastidc finetune` leave them, with drawn weights and captions that a test knows."""

import json
from pathlib import Path

import worlds

from fastidc import checkpoint
from fastidc.describe import write_no_change
from fastidc.evaluate.coco import write_references, write_results
from fastidc.tokenizer import vocabulary_of

TEST = list(range(3, 11))
TYPES = {"color": [0, 1, 2, 3, 4, 5], "move": [6, 7, 8], "add": [9, 10]}
HOSTILE = '<script>alert("x")</script><img src=http://a.b/c onerror=alert(1)> & the cube moved'
CAPTIONS = {
    "000003.png": "the red cube became blue",  # right
    "000004.png": "the blue cube moved",  # wrong: color
    "000005.png": "there is no change",  # wrong
    "000006.png": HOSTILE,  # move, so right
    "000007.png": "the red cube has been added",  # wrong
    "000008.png": "the sphere moved",  # right
    "000009.png": "the small ball has been added",  # right
    "000010.png": "",  # wrong
    **{f"{number:06d}.png_n": "nothing has changed" for number in TEST[:-1]},  # right
    "000010.png_n": "the zebra moved",  # wrong
}
RIGHT = ["000003.png", "000006.png", "000008.png", "000009.png", *(f"{number:06d}.png_n" for number in TEST[:-1])]


def data_folder(root: Path) -> Path:
    """CLEVR-Change's tree with three types of change; eight scenes in the test split."""
    worlds.clevr_tree(root, {"train": [0, 1], "val": [2], "test": TEST})
    (root / "type_mapping.json").write_text(json.dumps({kind: [f"{n:06d}.png" for n in numbers] for kind, numbers in TYPES.items()}))
    return root


def run_folder(path: Path, data: Path, stage: str, *, dataset: str = "clevr", **changes) -> Path:
    """A finished run of ``stage`` on ``data``: 60 steps, drawn weights."""
    ids = vocabulary_of([*CAPTIONS.values(), "the green cube left of the sphere moved", "there is no difference"])
    captioner = 2 if stage == "finetune" else 0
    config = worlds.SMALL.replace(vocabulary=ids, vocab_size=len(ids), captioner_layers=captioner, **changes)
    weights = checkpoint.from_official(worlds.official_state(config, "caption" if captioner else "adapt", 4))
    recipe = {"max_words": 12, "batch_size": 4, "seed": 0}
    settings = {"data": str(data), "dataset": dataset, "init": "runs/<b>adapt", "device": "cpu", "precision": "fp32", "steps": 60}
    checkpoint.save(path, config, weights, {"stage": stage, "preset": "tiny", "recipe": recipe, "run": settings})
    rows = [
        {"step": i, "epoch": i // 20, "lr": [1e-3 / i, 1e-5 / i], "seconds": i / 2, "loss": 8 / i, "grad_norm": 50 / i}
        for i in range(1, 61)
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"stage": stage, "dataset": dataset, "splits": {}}
    if stage == "adapt":
        metrics["selected"] = {"epoch": 1, "score": 12.5, "criterion": "text-to-pair R@1", "split": "val"}
        recalls = {"R@1": 12.5, "R@5": 50.0, "R@10": 87.5, "R@20": 100.0, "R@50": 100.0, "MdR": 5.0, "MnR": 6.25, "queries": 16}
        metrics["splits"]["test"] = {"text_to_pair": recalls, "pair_to_text": recalls | {"queries": 8}, "ties": "strict"}
        metrics["legacy_ties"] = {"test": metrics["splits"]["test"] | {"ties": "legacy"}}
    else:
        metrics["selected"] = {"epoch": 2, "score": 0.75, "criterion": "CIDEr", "split": "val"}
        references = {name: ["the cube moved", "the blue cube has <i>moved</i>"] for name in CAPTIONS}
        write_references(path / "references.json", references)
        write_results(path / "hyp_test.json", CAPTIONS)
        (path / "change_test.json").write_text(json.dumps({name: 0.125 if name.endswith("_n") else 0.875 for name in CAPTIONS}))
        write_no_change(path, ["nothing has changed"], {"scale": 2.0, "shift": 0.0, "split": "val", "pairs": 2})
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path
