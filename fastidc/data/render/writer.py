"""The file tree of a mini CLEVR-Change, written by one process or many, whole or not at all."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from fastidc.data.render.config import TYPES, RenderConfig
from fastidc.data.render.layout import MAPPING_ORDER, scene_ids, split_ids
from fastidc.data.render.png import encode_png
from fastidc.data.render.raycast import single_thread
from fastidc.data.render.record import changed_boxes, overlap, scene_record
from fastidc.data.render.scene import draw_scenes
from fastidc.data.render.shading import picture
from fastidc.errors import FastidcError
from fastidc.host import cores

FOLDERS = {"images": "CLEVR_default", "sc_images": "CLEVR_semantic", "nsc_images": "CLEVR_nonsemantic"}


def render_dataset(
    config: RenderConfig, out: str | Path, *, workers: int | None = None, device: str = "cpu", progress: bool = True
) -> dict:
    """Render a mini CLEVR-Change into the new folder ``out`` and return its summary (also in ``render.json``).

    The tree is that of the released data (data_evaluation.md 1.1) with ``bounding_boxes.json``, ``scene_graphs.json`` and
    ``render.json`` beside. ``workers``: processes, one per usable core by default (a single one on a GPU); scripts that ask for
    more than one need the usual ``if __name__ == "__main__"``. The bytes on a CPU depend on ``config`` alone, not on ``workers``;
    another device, kind of processor or build of torch may round a few pixels differently.

    Everything is written to a sibling folder that is renamed at the end, so ``out`` appears complete or not at all. Raises
    FastidcError when ``out`` exists and is not an empty folder, or when a worker process dies.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise FastidcError(f"{out} exists and is not an empty folder; give a new one.")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise FastidcError(f"workers must be a whole number of at least 1, not {workers!r}.")
    if workers is None:
        workers = cores()
        workers = workers if str(device) == "cpu" else 1
    partial = out.absolute().with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        for folder in FOLDERS:
            (partial / folder).mkdir(parents=True)
        summary = _write(config, partial, workers, str(device), progress)
        os.replace(partial, out)
    except OSError as error:
        raise FastidcError(f"{out} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def scenes_together(width: int, height: int) -> int:
    """How many scenes are rendered at once: enough arithmetic to outweigh the calls, little enough to stay near the cache."""
    return min(16, max(1, 614_400 // (width * height)))


def _write(config: RenderConfig, folder: Path, workers: int, device: str, progress: bool) -> dict:
    ids = scene_ids(config)
    jobs = [(number, change) for change, numbers in ids.items() for number in numbers]
    size = scenes_together(config.width, config.height)
    chunks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    results = {}
    bar = tqdm(total=len(jobs), desc="render", unit="scene", smoothing=0.05, disable=not progress)
    with bar:
        for part in _results(config, folder, chunks, min(workers, len(chunks)), device):
            results.update((result["record"]["image_index"], result) for result in part)
            bar.update(len(part))
    ordered = [results[number] for number, _ in jobs]
    records = [result["record"] for result in ordered]
    names = [f"CLEVR_default_{record['image_index']:06d}.png" for record in records]
    overlaps = [overlap(record) for record in records]
    boxes = [changed_boxes(record) for record in records]
    summary = _summary(config, ordered, overlaps)
    files = {
        "change_captions": dict(zip(names, (result["change"] for result in ordered))),
        "no_change_captions": dict(zip(names, (result["no_change"] for result in ordered))),
        "splits": split_ids(config, ids),
        "type_mapping": {change: [f"{number:06d}.png" for number in ids[change]] for change in MAPPING_ORDER},
        "change_captions_by_IOU": {str(record["image_index"]): str(value) for record, value in zip(records, overlaps)},
        "bounding_boxes": dict(zip(names, boxes)),
        "scene_graphs": {"scenes": records},
        "render": {"config": asdict(config), "summary": summary},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return summary


def _results(config: RenderConfig, folder: Path, chunks: list, workers: int, device: str) -> Iterator[list[dict]]:
    """The results of every chunk, in any order."""
    if workers == 1:
        for chunk in chunks:
            yield _render_chunk(config, folder, chunk, device)
        return
    # Forking a process that has threads, as one that used torch has, can deadlock: start afresh.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        todo = iter(chunks)
        running = {pool.submit(_render_chunk, config, folder, chunk, device) for chunk in islice(todo, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            running |= {pool.submit(_render_chunk, config, folder, chunk, device) for chunk in islice(todo, len(done))}
    except BrokenProcessPool as error:
        raise FastidcError("A render worker was killed, most likely for lack of memory; try fewer workers.") from error
    finally:
        # The folder goes away next, so wait for whoever still writes into it.
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; only the parent acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render_chunk(config: RenderConfig, folder: Path, chunk: list[tuple[int, str]], device: str) -> list[dict]:
    """Draw, render and write some scenes; what goes into the JSON files is returned."""
    with single_thread():
        scenes, traced = draw_scenes(config, chunk, device)
        images = picture(traced.scene3d, traced.tiles, traced.hits, config.smooth_edges).numpy()
    results = []
    for s, ((number, _), scene) in enumerate(zip(chunk, scenes)):
        for (subfolder, name), image in zip(FOLDERS.items(), images[3 * s :]):
            (folder / subfolder / f"{name}_{number:06d}.png").write_bytes(encode_png(image))
        results.append(
            {
                "record": scene_record(number, scene, traced.boxes[s], traced.visible[s]),
                "change": list(scene.change_captions),
                "no_change": list(scene.no_change_captions),
            }
        )
    return results


def _summary(config: RenderConfig, results: list[dict], overlaps: list[float]) -> dict:
    """How hard this world is."""
    records = [result["record"] for result in results]
    areas, counts = [], [len(record["before"]["objects"]) for record in records]
    for record in records:
        view = "after" if record["change_type"] == "add" else "before"
        x0, y0, x1, y1 = changed_boxes(record)[view]
        areas.append((x1 - x0) * (y1 - y0))
    change = [caption for result in results for caption in result["change"]]
    no_change = [caption for result in results for caption in result["no_change"]]
    return {
        "scenes": len(results),
        "pairs": 2 * len(results),
        "captions": len(change) + len(no_change),
        "types": {change_type: sum(record["change_type"] == change_type for record in records) for change_type in TYPES},
        "distinct_change_captions": len(set(change)),
        "distinct_no_change_captions": len(set(no_change)),
        "mean_words_per_change_caption": round(mean(len(caption.split()) for caption in change), 3),
        "mean_objects": round(mean(counts), 3),
        "median_objects": median(counts),
        "mean_changed_box_pixels": round(mean(areas), 1),
        "median_changed_box_pixels": median(areas),
        "mean_overlap": round(mean(overlaps), 4),
        "median_overlap": round(median(overlaps), 4),
        "min_overlap": round(min(overlaps), 4),
        "max_overlap": round(max(overlaps), 4),
    }
