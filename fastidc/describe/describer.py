"""Captions of pairs, one by one or as fast as the model goes."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from fastidc.config import penalty_of
from fastidc.describe.description import Description
from fastidc.describe.loading import Precision, default_model, load
from fastidc.describe.no_change import NO_CHANGE_FILE, NoChange, Sentences, change_probability, sentence_log_probs
from fastidc.describe.pixels import Batch, Image, batches
from fastidc.errors import FastidcError


class Describer:
    """A model that is kept ready. ``describer(before, after)`` captions a pair, ``describer.many(pairs)`` a stream of them.

    model: a fine-tuned run, any other source of `CLIP4IDC.from_pretrained` that holds a captioner, or a `CLIP4IDC`, which is put into
    evaluation mode; by default `default_model`. device: "auto", "cpu" or "cuda". beams: captions running at once, 1 is greedy.
    length_penalty: beams compete by the sum of log-probabilities over length ** this, by default 0.7: without one short captions win. max_words: longest caption in tokens, by default that
    of the model's training. precision: "auto" is bf16 on a GPU that has it, else fp32. no_change: what stands for "nothing changed", by
    default what the run folder says. FastidcError for a model without a captioner and for what cannot be decoded so.
    """

    def __init__(
        self,
        model: Any = None,
        device: str = "auto",
        beams: int = 3,
        *,
        length_penalty: float | None = None,
        max_words: int | None = None,
        precision: Precision = "auto",
        no_change: NoChange | None = None,
    ):
        self.ready = load(default_model("caption") if model is None else model, device, precision, max_words)
        self.ready.check_captioner()
        self.beams = beams
        self.length_penalty = penalty_of(beams, length_penalty)
        self.ready.model.check_decoding(1, self.ready.max_words, beams, self.length_penalty)
        self.no_change = self.ready.no_change if no_change is None else no_change
        self.p_change_reason: str | None = None
        """Why there is no probability of a change, where there is none."""
        self._sentences: Sentences | None = None
        if self.no_change is None:
            self.p_change_reason = (
                f"{self.ready.source} has no {NO_CHANGE_FILE}, the sentences of its training that say that nothing changed"
            )
        elif not self.no_change.sentences:
            self.p_change_reason = f"{self.ready.source} was trained without pairs in which nothing changed"
        else:
            self._sentences = Sentences(self.ready.tokenizer, self.no_change.sentences, self.ready.max_words)

    def __call__(self, before: Image, after: Image) -> Description:
        """The description of one pair; images as `many` takes them. FastidcError names an image that cannot be read."""
        return next(self.many([(before, after)], batch_size=1, workers=2))

    def many(
        self,
        pairs: Iterable[tuple[Image, Image]],
        batch_size: int = 32,
        *,
        errors: Literal["raise", "return"] = "raise",
        workers: int | None = None,
    ) -> Iterator[Description]:
        """Descriptions of ``pairs``, (before, after) each, in their order and as they come.

        Images are paths, PIL images of any mode, or uint8 arrays and tensors (`fastidc.describe.pixels.to_pixels`), read by ``workers``
        threads (by default one a core, 16 at most) ahead of the model; ``pairs`` may be endless. errors: "raise" ends with the FastidcError
        of the first image that cannot be read, after the pairs before it; "return" gives the error in the place of that pair's description.
        """
        if errors not in ("raise", "return"):
            raise FastidcError(f"errors is {errors!r}; raise or return was expected.")
        return self._many(batches(pairs, self.ready.model.config.image_size, batch_size, workers, self.ready.device.type == "cuda"), errors)

    def _many(self, found: Iterator[Batch], errors: str) -> Iterator[Description]:
        for batch in found:
            described = iter(self._describe(batch))
            for error in batch.errors:
                if error is not None and errors == "raise":
                    raise error
                yield error if error is not None else next(described)

    def _describe(self, batch: Batch) -> list[Description]:
        """Of the pairs without an error."""
        if not len(batch.images):
            return []
        ready = self.ready
        with ready.asked():
            tokens = ready.model.encode_batch(batch.images.to(ready.device, non_blocking=True))[1].flatten(0, 1)
            how = {"length_penalty": self.length_penalty, "empty": False}
            ids, log_probs = ready.model.generate_from_tokens(tokens, ready.max_words, self.beams, **how)
            change = None if self._sentences is None else change_probability(sentence_log_probs(ready.model, tokens, self._sentences))
        sums = log_probs.double().sum(1).tolist()
        changes = [None] * len(sums) if change is None else [self.no_change.calibrated(p) for p in change.tolist()]
        pairs = [pair for pair, error in zip(batch.pairs, batch.errors, strict=True) if error is None]
        return [self._description(*row) for row in zip(pairs, ids.tolist(), sums, changes, strict=True)]

    def _description(self, pair: tuple[Image, Image], row: list[int], log_prob: float, p_change: float | None) -> Description:
        tokenizer = self.ready.tokenizer
        ids = row[: row.index(tokenizer.end) + 1] if tokenizer.end in row else row
        return Description(tokenizer.decode(ids), tuple(ids), log_prob, p_change, self.p_change_reason, *pair)


def describe(before: Image, after: Image, model: Any = None, **options: Any) -> Description:
    """What changed between two images: `Describer`, for one pair. ``model``: as there, or a `Describer`, which is then not loaded again;
    options: those of `Describer`."""
    if isinstance(model, Describer):
        if options:
            raise FastidcError(f"{', '.join(options)}: a Describer has its options already; give them where it is made.")
        return model(before, after)
    return Describer(model, **options)(before, after)
