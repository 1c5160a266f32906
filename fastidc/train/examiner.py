"""Evaluation of the official run: its log lines, its caption files, and the paper's tables at the end."""

import functools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from fastidc.data.records import PairRecord
from fastidc.evaluate import paper
from fastidc.evaluate.background import BackgroundScorer
from fastidc.evaluate.captions import CaptionScorer
from fastidc.evaluate.coco import write_results
from fastidc.files import write_json
from fastidc.train.judge import Judge
from fastidc.train.scalars import Scalars


class Examiner:
    """Scores splits as the official scripts do and says so in their words; a context manager, because METEOR is a process of its own, which
    works beside the next epoch: its line comes when it is done, and the others wait for nothing but BLEU, ROUGE and CIDEr.

    ``references``: split -> image_id -> sentences, see `fastidc.train.interpret.references_by_split`. Every process calls `epoch` and
    `final`; the first one scores and writes.
    """

    def __init__(
        self,
        log: logging.Logger,
        judge: Judge,
        dataset: str,
        records: Mapping[str, Sequence[PairRecord]],
        references: Mapping[str, Mapping[str, Sequence[str]]],
        ties: str,
        out: Path,
    ):
        self.log, self.judge, self.dataset, self.records, self.out = log, judge, dataset, records, out
        self.ties = [ties, "strict" if ties == "legacy" else "legacy"]
        self.scalars: Scalars | None = None
        self._references = references
        self._quick: CaptionScorer | None = None
        self._whole: BackgroundScorer | None = None

    def __enter__(self) -> "Examiner":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._whole is not None:
            self._whole.close(cancel=exception[0] is not None)

    def epoch(self, epoch: int, split: str) -> float:
        """Scores a split after an epoch; the figure that selects: text-to-pair R@1, or CIDEr."""
        self.log.info("Eval on %s dataset", split)
        if self.judge.stage == "adapt":
            metrics = self._retrieval(split)
            score = metrics[self.ties[0]]["text_to_pair"]["R@1"]
            shown = {f"{a}/{b}": value for a in ("text_to_pair", "pair_to_text") for b, value in metrics[self.ties[0]][a].items()}
        else:
            shown = self._captions(epoch, split)
            score = shown["CIDEr"]
        if self.scalars is not None:
            self.scalars.add(shown, epoch, split)
        return score

    def final(self, name: str) -> None:
        """Scores the test split, writes metrics.json (and ``hyp_ep_{name}.json``) and shows the paper's table."""
        self.log.info("Eval on test dataset")
        if self.judge.stage == "adapt":
            metrics = self._retrieval("test")
            table = paper.retrieval_table(self.dataset, metrics)
        else:
            metrics = self._final_captions(f"hyp_ep_{name}.json")
            table = paper.caption_table(self.dataset, metrics)
        values = {"stage": self.judge.stage, "splits": {"test": metrics}}
        self.judge.world.on_main(lambda: write_json(self.out / "metrics.json", values))
        self.log.info("\n%s", table)

    def _retrieval(self, split: str) -> dict[str, dict]:
        records = self.records[split]
        self.log.warning("Eval under the multi-sentence per pair setting.")
        self.log.warning("sentence num: %d, pair num: %d", sum(len(record.captions) for record in records), len(records))
        metrics = self.judge.retrieval(records, self.ties)
        for ties in self.ties:
            if ties != self.ties[0]:
                self.log.info("with %s ties:", ties)
            lines = (("Text-to-Image-Pair:", "text_to_pair", ""), ("Image-Pair-to-Text:", "pair_to_text", "V2T$"))
            for title, direction, prefix in lines:
                values = metrics[ties][direction]
                self.log.info(title)
                shown = [f"{prefix}R@{k}: {values[f'R@{k}']:.1f}" for k in (1, 5, 10)]
                shown += [f"{prefix}Median R: {values['MdR']:.1f}", f"{prefix}Mean R: {values['MnR']:.1f}"]
                self.log.info("\t>>>  %s", " - ".join(shown))
                if self.dataset == "spot":  # the paper's columns, which the official scripts do not print
                    self.log.info("\t>>>  %s", " - ".join(f"{prefix}R@{k}: {values[f'R@{k}']:.1f}" for k in (10, 20, 50)))
        return metrics

    def _captions(self, epoch: int, split: str) -> dict:
        """All scores of a split but METEOR, which follows (`_tell`)."""
        hypotheses = self.judge.captions(self.records[split])

        def run() -> dict:
            write_results(self.out / f"hyp_ep_{epoch}.json", hypotheses)
            if self._quick is None:
                self._quick = CaptionScorer(self._all_references(), meteor=False, keep_empty_references=True)
            overall = self._quick.score(hypotheses)
            self._background().submit(hypotheses).add_done_callback(functools.partial(self._tell, epoch, split))
            return {name: value for name, value in overall.items() if not name.startswith("METEOR")}

        overall = self.judge.world.on_main(run)
        self.log.info(">>>  ROUGE_L: %.4f, CIDEr: %.4f", overall["ROUGE-L"], overall["CIDEr"])
        return overall

    def _tell(self, epoch: int, split: str, scored: Future[dict]) -> None:
        """An epoch's lines as the official scripts write them, from the thread that scores."""
        if scored.cancelled():
            return
        if error := scored.exception():
            self.log.warning("Epoch %d on %s: METEOR failed (%s).", epoch + 1, split, error)
            return
        overall = scored.result()["overall"]
        self.log.info("Epoch %d on %s, all scores:", epoch + 1, split)
        self._show(overall)
        if self.scalars is not None and overall["METEOR"] is not None:
            self.scalars.add({"METEOR": overall["METEOR"]}, epoch, split)

    def _final_captions(self, file: str) -> dict:
        records = self.records["test"]
        hypotheses = self.judge.captions(records)

        def run() -> dict:
            write_results(self.out / file, hypotheses)
            return self._background().submit(hypotheses, {record.id: record.type for record in records if record.type}).result()

        metrics = self.judge.world.on_main(run)
        self._show(metrics["overall"])
        return metrics

    def _show(self, overall: Mapping) -> None:
        self.log.info(">>>  %s", ", ".join(f"BLEU_{n}: {overall[f'BLEU-{n}']:.4f}" for n in (1, 2, 3, 4)))
        meteor = "none" if overall["METEOR"] is None else f"{overall['METEOR']:.4f}"
        self.log.info(">>>  METEOR: %s, ROUGE_L: %.4f, CIDEr: %.4f", meteor, overall["ROUGE-L"], overall["CIDEr"])

    def _all_references(self) -> dict[str, Sequence[str]]:
        """Ids are those of one data set and differ between its splits; empty references count, as in the official scorer."""
        return {name: sentences for split in self._references.values() for name, sentences in split.items()}

    def _background(self) -> BackgroundScorer:
        """One for all splits and epochs, so that METEOR starts once."""
        if self._whole is None:
            self._whole = BackgroundScorer(self._all_references(), keep_empty_references=True)
        return self._whole
