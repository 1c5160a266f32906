"""`fastidc demo`: the whole of CLIP4IDC on a small world, from nothing to a page of captioned pairs."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from fastidc.config import TrainOptions, preset
from fastidc.data.cache import default_path
from fastidc.data.cache_build import build
from fastidc.data.loaders import distinct_images
from fastidc.data.records import PairRecord, load_records
from fastidc.data.render import RenderConfig, render_dataset
from fastidc.errors import FastidcError
from fastidc.evaluate.captions import CaptionScorer, change_accuracy, object_colour_accuracy, type_accuracy
from fastidc.evaluate.coco import read_references, read_results
from fastidc.evaluate.meteor import one_meteor
from fastidc.evaluate.report import format_table, other_values
from fastidc.files import write_json
from fastidc.report import write_run_report
from fastidc.train.run import train

SHOWN_PAIRS = 40
SAVED_MINUTES = 0.5  # between snapshots: a stage takes a few minutes
# 4,000 training scenes, a camera that moves little, few objects: what a small model learns in minutes.
# Rendered 3:2 as CLEVR is and squashed to the model's 112 x 112 as CLIP4IDC squashes it, which leaves no empty bands.
WORLD = {"scenes": 4710, "width": 168, "height": 112, "jitter": 0.1, "min_objects": 3, "max_objects": 5}


@one_meteor()
def run_demo(
    out: Path,
    seed: int = 0,
    device: str = "auto",
    steps: tuple[int, int] | tuple[None, None] = (None, None),
    resume: Literal["auto", "none"] = "none",
    **world,
) -> dict:
    """Renders, adapts, fine-tunes `tiny`, captions the test split and scores it; returns what ``metrics.json`` holds.

    ``steps`` of adaptation and of fine-tuning replace the preset's, ``world`` overrides `WORLD` (tests use fewer). Writes under ``out``:
    data/, adapt/, finetune/, references.json (COCO), hyp_test.json, metrics.json and report.html. A data folder of the same world is
    used again. ``resume`` "auto": a stage that was interrupted goes on, and one that is finished stays.
    """
    started = time.perf_counter()
    config = RenderConfig(seed=seed, **{**WORLD, **world})
    difficulty = _world(config, out / "data")
    cache = _cache(out / "data")
    shared = {"data": out / "data", "preset": "tiny", "seed": seed, "device": device, "overwrite": True, "cache": cache}
    shared |= {"resume": resume, "save_every_minutes": SAVED_MINUTES}
    adapted = train("adapt", TrainOptions(out=out / "adapt", steps=steps[0], **shared))
    tuned = train("finetune", TrainOptions(out=out / "finetune", init=str(out / "adapt"), steps=steps[1], **shared))
    for name in ("references.json", "hyp_test.json"):
        shutil.copyfile(out / "finetune" / name, out / name)

    records = load_records(out / "data")["test"]
    references, hypotheses = read_references(out / "references.json"), read_results(out / "hyp_test.json")
    types = {record.id: record.type for record in records}
    with CaptionScorer(references) as scorer:
        constant, constant_scores = scorer.best_constant(types=types)
    scores = tuned["splits"]["test"]
    figures = {
        "change/no-change accuracy": change_accuracy(hypotheses, {s for record in records for s in record.no_change_captions}),
        "change-type accuracy": type_accuracy(hypotheses, types),
        "object-colour accuracy": object_colour_accuracy(hypotheses, _object_colours(out / "data", records)),
        "distinct captions": len(set(hypotheses.values())),
        "CIDEr above the best constant caption": scores["overall"]["CIDEr"] - constant_scores["overall"]["CIDEr"],
        "retrieval": adapted["splits"]["test"],
    }
    metrics = {
        "world": {"config": WORLD | world | {"seed": seed}, **difficulty},
        "captions": scores,
        "constant": {"caption": constant, "scores": constant_scores},
        **figures,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "metrics.json", metrics)
    headline = _headline(figures)
    world_line = "the world: " + ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in difficulty.items())
    print("\n" + format_table(scores | headline, (constant, constant_scores)) + "\n\n" + world_line)
    write_run_report(
        out / "finetune",
        out / "report.html",
        ids=_shown(records),
        device=device,
        title="fastidc demo: mini CLEVR-Change",
        notes=[
            "Model: the preset tiny, trained from random initialisation in this run; its inter layers read [before, after - before], "
            "which is fastidc's addition and not CLIP4IDC's input.",
            world_line,
        ],
        others=list(other_values(headline)),
    )
    print(f"\nopen {out / 'report.html'} to see {min(SHOWN_PAIRS, len(hypotheses))} pairs; all captions are in {out / 'hyp_test.json'}")
    return metrics


def _headline(figures: dict) -> dict:
    """The figures of ``metrics.json`` that a reader of the table wants, flat."""
    types, colour = figures["change-type accuracy"], figures["object-colour accuracy"]
    lines = {
        "CIDEr above the best constant caption (raw, not x 100)": figures["CIDEr above the best constant caption"],
        "change/no-change accuracy": figures["change/no-change accuracy"]["accuracy"],
        "distinct captions": figures["distinct captions"],
        "change-type accuracy": types["accuracy"],
        **{f"change-type accuracy, {kind}": share for kind, share in types["types"].items()},
        f"object-colour accuracy (of the {colour['named']} of {colour['pairs']} captions that name one)": colour["accuracy"],
    }
    for direction in ("text_to_pair", "pair_to_text"):
        recalls = figures["retrieval"][direction]
        lines[f"retrieval after adaptation, {direction.replace('_', ' ')}, R@1 / R@5 / R@10 in percent"] = " / ".join(
            f"{recalls[name]:.1f}" for name in ("R@1", "R@5", "R@10")
        )
    return lines


def _world(config: RenderConfig, data: Path) -> dict:
    """The world's difficulty; renders it unless ``data`` already holds this very world."""
    description = data / "render.json"
    if description.is_file():
        known = json.loads(description.read_text(encoding="utf-8"))
        if known.get("config") == asdict(config):
            return known["summary"]
        raise FastidcError(f"{data}: holds another world than the demo's; give another --out, or delete this folder.")
    return render_dataset(config, data)


def _cache(data: Path) -> Path:
    """The world's images, decoded once for both stages; one that is there already is used again."""
    size = preset("tiny").model.image_size
    return build(distinct_images(load_records(data).values()), data, default_path(data, size), size, dataset="clevr").path


def _object_colours(data: Path, records: list[PairRecord]) -> dict[str, str]:
    """image_id -> colour of the changed object, before the change (of an added one, after it)."""
    scenes = json.loads((data / "scene_graphs.json").read_text(encoding="utf-8"))["scenes"]
    test = {record.id for record in records}
    colours = {}
    for scene in scenes:
        name = f"{scene['image_index']:06d}.png"
        if name in test:
            view = "after" if scene["change_type"] == "add" else "before"
            colours[name] = scene[view]["objects"][scene["changed_object"]]["color"]
    return colours


def _shown(records: list[PairRecord]) -> list[str]:
    """Ids of pairs, evenly spread over the test split, three change pairs to one distractor pair."""
    scenes = records[:: max(1, len(records) // SHOWN_PAIRS)][:SHOWN_PAIRS]
    return [record.no_change_id if i % 4 == 3 else record.id for i, record in enumerate(scenes)]


def _short(value) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + ")"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
