"""Scores a model on a split, all processes sharing the work: retrieval after adaptation, captions after fine-tuning."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm

from fastidc.config import Recipe
from fastidc.data.images import Pixels
from fastidc.data.records import PairRecord
from fastidc.describe import NoChange, change_probabilities
from fastidc.evaluate.captions import CaptionScorer, score_by_subset
from fastidc.evaluate.paper import KS
from fastidc.evaluate.predict import embed_pairs, embed_sentences, predict_captions, references_of, sentences_of
from fastidc.evaluate.retrieval import retrieval_metrics
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import Tokenizer
from fastidc.train.distributed import World
from fastidc.train.optim import Stage
from fastidc.train.precision import Precision


class Judge:
    """A model in training and what it is judged by. Every process calls every method; results are on all of them.

    Captions are greedy by default, as officially; ``beams`` and ``length_penalty`` are those of `CLIP4IDC.generate_from_tokens`, and
    FastidcError says what the model cannot do of them.
    """

    def __init__(
        self,
        stage: Stage,
        model: CLIP4IDC,
        tokenizer: Tokenizer,
        images: Pixels,
        recipe: Recipe,
        world: World,
        precision: Precision,
        batch_size: int = 64,
        beams: int = 1,
        length_penalty: float = 0.0,
    ):
        if stage == "finetune":  # now, rather than after an epoch
            model.check_decoding(1, recipe.max_words, beams, length_penalty)
        self.stage, self.model, self.tokenizer, self.images, self.recipe = stage, model, tokenizer, images, recipe
        self.world, self.precision, self.batch_size = world, precision, batch_size
        self.beams, self.length_penalty = beams, length_penalty
        self._scorer: tuple[tuple[str, ...], CaptionScorer] | None = None
        self.criterion = "text-to-pair R@1" if stage == "adapt" else "CIDEr"

    def score(self, records: Sequence[PairRecord]) -> tuple[float, dict]:
        """The selection criterion and all metrics of a split (METEOR left out: it is slow and decides nothing)."""
        if self.stage == "adapt":
            metrics = self.retrieval(records)["strict"]
            return metrics["text_to_pair"]["R@1"], metrics
        hypotheses = self.captions(records)

        def run() -> dict:
            return self._scorer_of(records).score(hypotheses)

        metrics = self.world.on_main(run)
        return metrics["CIDEr"], metrics

    def _scorer_of(self, records: Sequence[PairRecord]) -> CaptionScorer:
        """One for a split, whose references are tokenised once, not after every epoch."""
        key = tuple(record.id for record in records)
        if self._scorer is None or self._scorer[0] != key:
            self._scorer = key, CaptionScorer(references_of(records), meteor=False)
        return self._scorer[1]

    def caption_scores(self, records: Sequence[PairRecord], hypotheses: Mapping[str, str]) -> dict:
        """All caption metrics, overall and by kind of pair (`fastidc.evaluate.captions.score_by_subset`)."""

        def run() -> dict:
            return score_by_subset(references_of(records), hypotheses, {record.id: record.type for record in records if record.type})

        return self.world.on_main(run)

    def retrieval(self, records: Sequence[PairRecord], ties: Sequence[str] = ("strict",)) -> dict[str, dict]:
        """{ties: metrics} of a split (`fastidc.evaluate.retrieval.retrieval_metrics`)."""
        distinct, rows, owner = sentences_of(records)
        mine = self.world.share(list(records))
        with self._evaluating(), self._bar("embed", mine) as bar:
            pairs = embed_pairs(self.model, mine, self.images, batch_size=self.batch_size, bar=bar)
            text = embed_sentences(self.model, self.tokenizer, self.world.share(distinct), max_words=self.recipe.max_words)
        all_pairs, all_text = self.world.gather_rows(pairs), self.world.gather_rows(text)

        def run() -> dict[str, dict]:
            with torch.no_grad():
                device = self.model.logit_scale.device
                similarity = self.model.similarity(all_text.to(device), all_pairs.to(device)).cpu()[rows]
            return {name: retrieval_metrics(similarity, owner, ties=name, ks=KS) for name in ties}

        return self.world.on_main(run)

    def captions(self, records: Sequence[PairRecord]) -> dict[str, str]:
        """image_id -> caption, ordered as `references_of`."""
        mine = self.world.share(list(records))
        with self._evaluating(), self._bar("caption", mine) as bar:
            found = predict_captions(
                self.model,
                self.tokenizer,
                mine,
                self.images,
                batch_size=self.batch_size,
                max_length=self.recipe.max_words,
                beams=self.beams,
                length_penalty=self.length_penalty,
                bar=bar,
            )
        parts = self.world.gather([{name: found[name] for name in (r.id, r.no_change_id) if name in found} for r in mine])

        def run() -> dict[str, str]:
            everything = {name: caption for part in parts for name, caption in part.items()}
            return {name: everything[name] for name in references_of(records)}

        return self.world.on_main(run)

    def change(self, records: Sequence[PairRecord], sentences: Sequence[str]) -> dict[str, float]:
        """image_id -> probability that the pair changed, not calibrated (`fastidc.describe.change_probabilities`), ordered as `references_of`."""
        mine, how = self.world.share(list(records)), {"max_words": self.recipe.max_words, "batch_size": self.batch_size}
        with self._evaluating(), self._bar("change", mine) as bar:
            found = change_probabilities(self.model, self.tokenizer, mine, self.images, NoChange(tuple(sentences)), **how, bar=bar)
        everything = {name: p for part in self.world.gather_everywhere(found) for name, p in part.items()}
        return {name: everything[name] for name in references_of(records)}

    def _bar(self, what: str, records: Sequence[PairRecord]):
        total = sum(len(record.images) - 1 for record in records)
        return tqdm(total=total, desc=what, unit="pair", leave=False, disable=None if self.world.is_main else True)

    @contextmanager
    def _evaluating(self):
        self.model.eval()
        with self.precision.autocast():
            yield
