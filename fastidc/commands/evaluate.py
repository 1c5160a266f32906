"""`fastidc evaluate captions|retrieval|run`."""

from pathlib import Path
from typing import Any, Literal

from fastidc.commands.caption import say
from fastidc.errors import FastidcError


def captions(
    references: Path,
    predictions: Path,
    types: Path | None = None,
    iou: Path | None = None,
    subset: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    json: Path | None = None,
    csv: Path | None = None,
) -> None:
    """BLEU, METEOR, ROUGE-L and CIDEr of a caption file, as pycocoevalcap has them.

    Example: fastidc evaluate captions --references gt.json --predictions hyp.json

    Args:
        references: COCO file of the references: {"annotations": [{"image_id", "caption"}]}.
        predictions: COCO results: [{"image_id", "caption"}].
        types: type_mapping.json, {type: [ids]}: scores by type too.
        iou: change_captions_by_IOU.json, {scene: IoU}: scores by bins of 0.2 too.
        subset: Score the ids in both files where the two differ.
        resamples: Of the bootstrap over pairs; 0 leaves the intervals out.
        seed: Of the bootstrap.
        json: Write the scores here, raw values.
        csv: Write the scores of every caption here.
    """
    from fastidc.evaluate.coco import read_overlaps, read_references, read_results, read_types
    from fastidc.evaluate.scorecard import match, score

    known, found = read_references(references), read_results(predictions)
    hypotheses, warnings = match(known, found, subset, (references, predictions))
    kinds = None if types is None else read_types(types)
    if kinds is not None and kinds.keys().isdisjoint(hypotheses):
        raise FastidcError(f"{types}: names none of the pairs of {predictions}; give the type mapping of this data set.")
    overlaps = None if iou is None else read_overlaps(iou, hypotheses)
    if overlaps is not None and not overlaps:
        raise FastidcError(f"{iou}: names none of the scenes of {predictions}; give the IoU file of this data set.")
    _check_resamples(resamples, seed)
    options: dict[str, Any] = {"types": kinds, "overlaps": overlaps, "resamples": resamples, "seed": seed}
    card = score(known, hypotheses, **options, warnings=warnings, report=say)
    print(card.table())
    _write(json, card.as_json() | {"files": {"references": str(references), "predictions": str(predictions)}})
    if csv is not None:
        print(f"wrote {card.write_csv(csv)}")


def retrieval(
    similarity: Path | None = None,
    run: Path | None = None,
    data: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    ties: Literal["strict", "legacy", "both"] = "both",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resamples: int = 1000,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Recall and ranks in both directions, of a similarity matrix or a run.

    Example: fastidc evaluate retrieval --run runs/adapt --json retrieval.json

    Args:
        similarity: .npz with similarity [sentences, pairs] and text_to_pair [sentences], or a square .npy.
        run: Or a run, whose model embeds the split.
        data: With --run: the data, where they are not where the run had them.
        split: With --run: the split.
        ties: strict: a tie is a loss. legacy: the official code's, for published numbers.
        device: With --run: where to embed.
        resamples: Of the bootstrap over pairs; 0 leaves the intervals out.
        seed: Of the bootstrap.
        json: Write the metrics here.
    """
    from fastidc.evaluate.similarities import read_similarity, score_similarity, table

    if (similarity is None) == (run is None):
        raise FastidcError("retrieval scores one of --similarity FILE and --run RUN_DIR; give exactly one of them.")
    _check_resamples(resamples, seed)
    names = ("strict", "legacy") if ties == "both" else (ties,)
    if run is None:
        matrix, owner = read_similarity(similarity)
    else:
        matrix, owner = _similarity(_run_folder(run, data), split, device)
    scores = score_similarity(matrix, owner, names, resamples, seed)
    print(table(scores))
    _write(json, {**scores, "bootstrap": _bootstrap(resamples, seed), "source": str(similarity or run)})


def run(
    run_dir: Path,
    /,
    data: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    beams: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resamples: int = 1000,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Score a run: captions of a fine-tuned one, retrieval of an adapted one.

    Captions are those that it wrote; --data or --beams asks for new ones.

    Example: fastidc evaluate run runs/finetune --json scores.json

    Args:
        run_dir: RUN_DIR, the folder of `fastidc adapt` or `fastidc finetune`.
        data: The data, where they are not where the run had them.
        split: The split.
        beams: Caption again with so many beams.
        device: Where the model runs, if it does.
        resamples: Of the bootstrap over pairs; 0 leaves the intervals out.
        seed: Of the bootstrap.
        json: Write everything here.
    """
    from fastidc.evaluate.rerun import change_probabilities

    _check_resamples(resamples, seed)
    folder = _run_folder(run_dir, data)
    facts = {"stage": folder.stage, "dataset": folder.dataset, "split": split}
    if folder.stage == "adapt":
        if beams is not None:
            raise FastidcError(f"{run_dir}: is an adapted run, which has no captions; leave --beams out.")
        _adapted(folder, split, device, resamples, seed, json, facts)
        return
    probabilities = change_probabilities(run_dir, split)  # before minutes of work: a broken file is said at once
    _finetuned(folder, data, split, beams, device, resamples, seed, json, facts, probabilities)


def _adapted(folder, split: str, device: str, resamples: int, seed: int, json: Path | None, facts: dict) -> None:
    from fastidc.evaluate import paper
    from fastidc.evaluate.similarities import score_similarity, table

    scores = score_similarity(*_similarity(folder, split, device), resamples=resamples, seed=seed)
    print(table(scores))
    print("\n" + paper.retrieval_table(folder.dataset, scores))
    _write(json, facts | scores | {"bootstrap": _bootstrap(resamples, seed)})


def _finetuned(folder, data, split, beams, device, resamples, seed, json, facts, probabilities) -> None:
    from fastidc.evaluate import paper
    from fastidc.evaluate.rerun import about_change
    from fastidc.evaluate.scorecard import match, score

    found = folder.written(split) if data is None and beams is None else None
    records: list[Any] = []
    if found is None or folder.data.exists():
        records = folder.records(split)
    else:
        say(f"{folder.data} is not there, so pairs have no types; say with --data where the data are.")
    if found is None:
        found = _caption_again(folder, records, device, beams)
        facts = facts | {"captions": "made again"}
    references, hypotheses = found
    hypotheses, warnings = match(references, hypotheses, False, (folder.folder / "references.json", folder.folder / f"hyp_{split}.json"))
    types = {record.id: record.type for record in records if record.type}
    card = score(
        references,
        hypotheses,
        types=types or None,
        overlaps=folder.overlaps(hypotheses),
        resamples=resamples,
        seed=seed,
        warnings=warnings,
        report=say,
    )
    said = about_change(hypotheses, types)
    print(card.table())
    if accuracy := said.get("change_accuracy"):
        print(f"tells change from no change: {_percent(accuracy['accuracy'])} of {accuracy['pairs']} pairs")
    if accuracy := said.get("type_accuracy"):
        kinds = ", ".join(f"{kind} {_percent(share)}" for kind, share in accuracy["types"].items())
        print(f"tells the type of change: {_percent(accuracy['accuracy'])} of {accuracy['pairs']} change pairs ({kinds})")
    if probabilities is not None:
        after = f", {probabilities['calibrated_error']:.4f} calibrated on val" if "calibrated_error" in probabilities else ""
        print(f"p(change): AUC {probabilities['auc']:.4f}, calibration error {probabilities['calibration_error']:.4f}{after}")
        said["change_probability"] = probabilities
    print("\n" + paper.caption_table(folder.dataset, card.scores))
    _write(json, facts | card.as_json() | said)


def _run_folder(folder: Path, data: Path | None):
    from fastidc.checkpoint import read_config
    from fastidc.evaluate.rerun import RunFolder

    return RunFolder.of(folder, read_config(folder), data)


def _model(folder, device: str):
    """The run's model on a device, and the context in which it runs there: as in training where that was of the same kind."""
    import torch

    from fastidc.train.precision import choose_precision

    if device == "cuda" and not torch.cuda.is_available():
        raise FastidcError("--device cuda: there is no GPU that torch can use; leave it out, or say --device cpu.")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    same = folder.settings.get("device") == place.type
    precision = choose_precision(folder.settings.get("precision", "auto") if same else "auto", place)
    model = folder.model(place)
    if precision.name == "fp16-official":
        precision.prepare(model)
    return model, precision.autocast()


def _similarity(folder, split: str, device: str):
    from fastidc.evaluate.rerun import similarity_of

    records = folder.records(split)
    model, autocast = _model(folder, device)
    return similarity_of(folder, model, records, autocast)


def _caption_again(folder, records: list, device: str, beams: int | None):
    from fastidc.evaluate.rerun import caption_again

    model, autocast = _model(folder, device)
    chosen = folder.settings.get("beams", 1) if beams is None else beams
    return caption_again(folder, model, records, autocast, chosen, folder.settings.get("length_penalty", 0.0))


def _check_resamples(resamples: int, seed: int) -> None:
    for flag, value in (("--resamples", resamples), ("--seed", seed)):
        if value < 0:
            raise FastidcError(f"{flag} must be at least 0, got {value}.")


def _bootstrap(resamples: int, seed: int) -> dict[str, Any]:
    from fastidc.evaluate.intervals import LEVEL

    return {"level": LEVEL, "resamples": resamples, "seed": seed, "unit": "pair"}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _write(path: Path | None, value: dict[str, Any]) -> None:
    from fastidc.files import write_json

    if path is not None:
        print(f"wrote {write_json(path, value)}")
