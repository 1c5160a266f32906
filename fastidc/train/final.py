"""What a stage leaves besides weights: scores of the test split, and what the probability of a change needs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastidc.data.records import PairRecord
from fastidc.describe import fit_change_probability, no_change_sentences, write_change_probabilities, write_no_change
from fastidc.evaluate.coco import write_references, write_results
from fastidc.evaluate.predict import references_of
from fastidc.train.session import Session

Written = Callable[[Callable[[], Any]], Any]  # has the first process write something; every process calls


def write_about_change(out: Path, session: Session, records: Mapping[str, Sequence[PairRecord]], written: Written) -> None:
    """What the model's probability of a change needs (no_change.json), and that of every pair of val and test (change_SPLIT.json)."""
    sentences, calibration = no_change_sentences(records["train"]), None
    for split in ("val", "test") if sentences else ():
        if part := records[split]:
            found = session.judge.change(part, sentences)
            written(lambda split=split, found=found: write_change_probabilities(out, split, found))
            if split == "val":
                calibration = fit_change_probability(found, part)
    written(lambda: write_no_change(out, sentences, calibration))


def score_test(out: Path, session: Session, records: Sequence[PairRecord], metrics: dict, written: Written) -> None:
    """Puts all metrics of the test split into ``metrics``; captions and references are written beside."""
    judge = session.judge
    if session.stage == "adapt":
        retrieval = judge.retrieval(records, ("strict", "legacy"))
        metrics["splits"]["test"], metrics["legacy_ties"] = retrieval["strict"], {"test": retrieval["legacy"]}
        return
    hypotheses = judge.captions(records)
    written(lambda: write_references(out / "references.json", references_of(records)))
    written(lambda: write_results(out / "hyp_test.json", hypotheses))
    metrics["splits"]["test"] = judge.caption_scores(records, hypotheses)
