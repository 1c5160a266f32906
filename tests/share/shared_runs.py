"""Run folders as training leaves them, with scores, and with paths of a machine in them."""

import json
from pathlib import Path

from describe.cases import run_folder

FACTS = {
    "stage": "finetune",
    "preset": "clevr",
    "run": {
        "data": "/home/somebody/secret/data",
        "dataset": "clevr",
        "init": "/home/somebody/secret/adapt",
        "device": "cpu",
        "precision": "fp32",
        "processes": 2,
        "steps": 600,
        "beams": 1,
        "torch": "2.10.0",
    },
    "note": ["/home/somebody/secret/note.txt", "kept / as it is"],
}


def block(pairs: int, meteor: float | None = 0.25) -> dict:
    scores = {"pairs": pairs, "BLEU-4": 0.5, "METEOR": meteor, "ROUGE-L": 0.625, "CIDEr": 1.234}
    return scores if meteor is not None else scores | {"METEOR_reason": "there is no Java."}


CAPTION_METRICS = {
    "stage": "finetune",
    "dataset": "clevr",
    "selected": {"epoch": 3, "score": 1.2, "criterion": "CIDEr", "split": "val", "val": {}},
    "splits": {"test": {"overall": block(8), "change": block(4), "no_change": block(4), "types": {"move": block(3), "color": block(1)}}},
}
RANKS = {"R@1": 12.5, "R@5": 50.0, "R@10": 75.0, "MdR": 5, "MnR": 7.25}
RETRIEVAL_METRICS = {
    "stage": "adapt",
    "dataset": "spot",
    "selected": None,
    "splits": {"test": {"text_to_pair": RANKS, "pair_to_text": RANKS | {"R@1": 25.0}}},
    "legacy_ties": {"test": {"text_to_pair": RANKS | {"R@1": 99.0}, "pair_to_text": RANKS}},
}


def finished(path: Path, metrics: dict | None = CAPTION_METRICS, facts: dict = FACTS, **options) -> Path:
    """A run folder with everything that a run of training holds; options: `run_folder`'s."""
    run_folder(path, **options)
    config = json.loads((path / "config.json").read_text())
    facts = dict(facts) | {"recipe": config["recipe"] | {"lr": 1e-4, "batch_size": 16, "augment": ""}}
    (path / "config.json").write_text(json.dumps(config | facts))
    (path / "log.jsonl").write_text('{"loss": 1.0}\n')
    if metrics is not None:
        (path / "metrics.json").write_text(json.dumps(metrics))
    return path
