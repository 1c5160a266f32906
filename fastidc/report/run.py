"""`fastidc report`: a run folder as a page."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastidc import checkpoint
from fastidc.describe.loading import Ready, load
from fastidc.describe.no_change import NoChange
from fastidc.errors import FastidcError
from fastidc.evaluate.captions import CHANGE_TYPES
from fastidc.evaluate.rerun import RunFolder, read_probabilities
from fastidc.evaluate.scorecard import Scorecard, match, score
from fastidc.report import gallery, tables
from fastidc.report.curves import LOG_FILE, charts, read_rows
from fastidc.report.page import Card, Page, write_page

SPLIT = "test"
PAIRS = 400
_MAPS = (
    "Attention maps: mean over heads of a class token's softmax over patches, laid over before | after, each layer on one scale. Above: the "
    "last intra layer, each image's own class token. Below: the last inter layer, the before-image's class token."
)
_TYPED = "Right and wrong judge the kind of change that a caption tells (its colour, material, place, what came or went, or none), not every word."
_EITHER = "Right and wrong judge whether a caption says that something changed, nothing else."
_PROBABLE = "p(change) is 1 minus the probability of all no-change sentences of the training split{}."


def write_run_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    pairs: int = PAIRS,
    ids: Sequence[str] | None = None,
    device: str = "auto",
    resamples: int = 1000,
    title: str | None = None,
    notes: Sequence[str] = (),
    others: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] | None = None,
) -> Path:
    """One HTML page of what `fastidc adapt` or `fastidc finetune` left in ``folder``, by default as its report.html; returns where it is.

    data: the data, where they are not where the run had them. pairs: how many of the test split are shown, drawn with a fixed seed; ids: these
    instead. device: where the model runs, which the maps (and retrieval) need. resamples: of the bootstrap; 0 leaves intervals out.
    title, notes, others: heading, further lines and figures (name, value). say: hears what is left out, and why.

    FastidcError where the folder is no run, the data are not there, a file is damaged or an image cannot be read; nothing is written then.
    """
    folder = Path(folder)
    if pairs < 1:
        raise FastidcError(f"pairs must be at least 1, got {pairs}.")
    config = checkpoint.read_config(folder)
    run = RunFolder.of(folder, config, None if data is None else Path(data))
    builder = _Builder(run, config, device, resamples, say or (lambda sentence: None))
    page = builder.page(pairs, ids)
    named = title or f"fastidc {run.stage}: {'/'.join(folder.resolve().parts[-2:])}"
    page = replace(page, title=named, notes=[*notes, *builder.missing], others=list(others))
    return write_page(folder / "report.html" if out is None else out, page)


class _Builder:
    """Puts a page together; ``missing`` hears what the run does not have."""

    def __init__(self, run: RunFolder, config: Mapping[str, Any], device: str, resamples: int, say: Callable[[str], None]):
        self.run, self.config, self.device, self.resamples, self.say = run, config, device, resamples, say
        self.missing: list[str] = []

    def lacks(self, sentence: str) -> None:
        self.missing.append(sentence)
        self.say(sentence)

    def page(self, count: int, ids: Sequence[str] | None) -> Page:
        run, metrics = self.run, tables.read_metrics(self.run.folder)
        log = read_rows(run.folder / LOG_FILE)
        page = Page("", facts=self._facts(log), charts=charts(log, run.folder, metrics.get("selected")))
        if not metrics:
            self.lacks("The run has no metrics.json: it is still going on, or was cut off.")
        records = self._records()
        return (self._adapted if run.stage == "adapt" else self._finetuned)(page, metrics, records, count, ids)

    def _records(self) -> list:
        records = self.run.all_records()[SPLIT]
        if not records:
            self.lacks("The data have no test split, so there are neither scores nor pairs.")
        return records

    def _facts(self, log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        config, settings, recipe = self.config, self.run.settings, self.config["recipe"]
        facts = [
            ("stage", self.run.stage),
            ("data set", self.run.dataset),
            ("preset", config.get("preset")),
            ("start", settings.get("init")),
        ]
        facts += [("steps", settings.get("steps")), ("batch", recipe.get("batch_size")), ("precision", settings.get("precision"))]
        facts += [("device", settings.get("device")), ("seed", recipe.get("seed"))]
        seconds = log[-1].get("seconds") if log else None
        if isinstance(seconds, (int, float)):
            facts.append(("training", f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"))
        return [(name, str(value)) for name, value in facts if value is not None]

    def _model(self) -> tuple[Ready | None, bool]:
        """The model, and whether it has maps."""
        if not (self.run.folder / checkpoint.WEIGHTS_FILE).is_file():
            self.lacks(f"The run has no {checkpoint.WEIGHTS_FILE} yet, so there are no attention maps.")
            return None, False
        ready = load(self.run.folder, self.device)
        config = ready.model.config
        maps = config.intra_layers < config.vision_layers
        if not maps:
            self.lacks("The model has no inter layer, so there are no attention maps of pairs.")
        return ready, maps

    def _chosen(self, known: Mapping[str, gallery.Pair], count: int, ids: Sequence[str] | None) -> list[gallery.Pair]:
        for name in ids or ():
            if name not in known:
                raise FastidcError(f"{self.run.data}: its {SPLIT} split has no pair {name!r}; give ids of pairs that it has.")
        return [known[name] for name in (gallery.drawn(list(known), count) if ids is None else ids)]

    def _seen(self, chosen: Sequence[gallery.Pair], hits: bool = False) -> tuple[list[gallery.Pictures], Ready | None, bool]:
        from tqdm import tqdm

        ready, maps = self._model() if chosen else (None, False)
        with tqdm(total=len(chosen), desc="report", unit="pair", file=sys.stderr, disable=None) as bar:
            return list(gallery.pictures(chosen, ready, maps=maps, hits=hits, bar=bar)), ready, maps

    def _adapted(self, page: Page, metrics: Mapping, records: list, count: int, ids: Sequence[str] | None) -> Page:
        import torch

        from fastidc.report.queries import queries

        known = gallery.pairs_of(records, no_change=False)
        chosen = self._chosen(known, count, ids)
        seen, ready, maps = self._seen(chosen, hits=True)
        found, legacy = (metrics.get(name, {}).get(SPLIT) for name in ("splits", "legacy_ties"))
        if found:
            page = replace(
                page, scores=tables.retrieval_scores(found, legacy), paper=tables.paper_retrieval(self.run.dataset, found, legacy)
            )
        if ready is not None:
            asked = queries(chosen, seen, torch.stack([each.embedding for each in seen]), ready)
            note = f"Sentences of the test split and the nearest of the {len(chosen):,} pairs below, by cosine; the recall above is of the whole split."
            page = replace(page, queries=asked, query_note=note)
        cards = [Card(p.id, s.before, s.after, p.references, p.type, map=s.map) for p, s in zip(chosen, seen, strict=True)]
        return replace(page, cards=cards, gallery_note=_note(chosen, known), legend=[_MAPS] if maps else [])

    def _finetuned(self, page: Page, metrics: Mapping, records: list, count: int, ids: Sequence[str] | None) -> Page:
        known, run = gallery.pairs_of(records), self.run
        written = run.written(SPLIT) if records else None
        if written is None:
            if records:
                self.lacks(f"The run has no captions of the {SPLIT} split (hyp_{SPLIT}.json and references.json).")
            captions, card = {}, None
        else:
            captions, card = self._scored(*written, records)
            known = {name: pair for name, pair in known.items() if name in captions}
        if records and not known:
            raise FastidcError(f"{run.data}: none of its pairs is captioned in {run.folder}; say with --data where the run's own data are.")
        chosen = self._chosen(known, count, ids)
        seen, _, maps = self._seen(chosen)
        kinds = {pair.type for pair in known.values() if pair.changed}
        typed, both = bool(kinds) and kinds <= set(CHANGE_TYPES), any(not pair.changed for pair in known.values())
        no_change = NoChange.of_run(run.folder) or NoChange(())
        chances, legend = self._chances(no_change), [_MAPS] if maps else []
        cards = []
        for pair, look in zip(chosen, seen, strict=True):
            caption = captions.get(pair.id)
            right = None if caption is None else gallery.judge(caption, pair, typed, both)
            own = None if card is None else card.captions[pair.id]["CIDEr"]
            facts = {"p_change": chances.get(pair.id), "score": None if own is None else 100 * own, "right": right, "map": look.map}
            cards.append(Card(pair.id, look.before, look.after, pair.references, pair.type, caption, **facts))
        if any(one.right is not None for one in cards):
            legend.append(_TYPED if typed else _EITHER)
        if any(one.p_change is not None for one in cards):
            legend.append(_PROBABLE.format(", calibrated on val" if no_change.calibration else ", not calibrated"))
        if card is not None:
            page = replace(page, scores=tables.caption_scores(card), paper=tables.paper_captions(run.dataset, card))
            legend.append("CIDEr of a pair is that caption's own, times 100, with the document frequencies of the whole split.")
        return replace(page, cards=cards, gallery_note=_note(chosen, known), legend=legend)

    def _scored(self, references: dict, hypotheses: dict, records: list) -> tuple[dict[str, str], Scorecard]:
        names = (self.run.folder / "references.json", self.run.folder / f"hyp_{SPLIT}.json")
        hypotheses, warnings = match(references, hypotheses, True, names)
        types = {record.id: record.type for record in records if record.type and record.id in hypotheses}
        options = {"types": types or None, "resamples": self.resamples, "warnings": warnings, "report": self.say}
        return hypotheses, score(references, hypotheses, **options)

    def _chances(self, no_change: NoChange) -> dict[str, float]:
        """p(change) of the test split's pairs, calibrated where the run has a calibration."""
        path = self.run.folder / f"change_{SPLIT}.json"
        if not path.is_file():
            return {}
        return {name: no_change.calibrated(p) for name, p in read_probabilities(path).items()}


def _note(chosen: Sequence, known: Mapping) -> str:
    return (
        ""
        if len(chosen) == len(known)
        else f"They are {len(chosen):,} of the {len(known):,} of the {SPLIT} split, drawn with a fixed seed."
    )
