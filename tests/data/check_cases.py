"""Small clean data sets of every reader, in which tests of the check plant what is wrong."""

import json
from pathlib import Path

import worlds

from fastidc.data.check import check

SIZE = (24, 20)


def different_images(root: Path) -> Path:
    """Every image of a tree anew, each with content of its own: those of `worlds` are all alike, which the check takes ill."""
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".webp"))
    for seed, path in enumerate(files):
        worlds.noise_image(path, seed, SIZE)
    return root


def clevr(root: Path) -> Path:
    return worlds.clevr_tree(root, {"train": [3, 1, 7], "val": [2], "test": [5, 4]})


def spot(root: Path) -> Path:
    splits = {
        "train": [("76", ["a car is gone"]), ("9", ["two people left", "a van"])],
        "val": [("31", ["he left"])],
        "test": [("8", ["one"])],
    }
    return different_images(worlds.spot_tree(root, splits))


def ier(root: Path) -> Path:
    splits = {
        "train": [("Z_2", "a.jpg", "b.png", ["make it dark"]), ("Z_3", "a.jpg", "c.png", ["crop it", "cut"])],
        "valid": [("R_1", "d.jpg", "e.jpg", ["brighter"])],
        "test": [("R_2", "g.jpg", "f.jpg", ["remove him"])],
    }
    return different_images(worlds.ier_tree(root, splits))


def birds(root: Path) -> Path:
    rows = [("64", "55", "train", "Animal 1 is brown."), ("11", "12", "val", "It has a cap."), ("13", "14", "test", "Larger.")]
    return different_images(worlds.birds_tree(root, rows))


def table(root: Path, suffix: str = "csv", **columns: str) -> Path:
    names = {"train": ["p", "q"], "val": ["r"], "test": ["s"]}
    rows = [
        {"id": name, "before": f"{name}1.png", "after": f"{name}2.png", "caption": f"the {name} is gone", "split": split, **columns}
        for split, ids in names.items()
        for name in ids
    ]
    worlds.table_file(root / f"pairs.{suffix}", rows)
    return different_images(root)


def folder(root: Path) -> Path:
    worlds.pair_folder(root, {"10": ["a car left", "gone"], "7": ["a van came"], "5": ["a dog"]})
    (root / "splits.json").write_text(json.dumps({"train": ["10"], "val": ["7"], "test": ["5"]}))
    return different_images(root)


WORLDS = {"clevr": clevr, "spot": spot, "ier": ier, "birds": birds, "table": table, "folder": folder}


def edit(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def found(root: Path, *args, **kwargs) -> list[tuple[str, str, str, str, str]]:
    """(level, kind, file, place, field) of every problem, the worst first."""
    findings = check(root, *args, progress=False, **kwargs)
    return [(p.level, p.kind, p.file, p.place, p.field) for p in findings.problems]
