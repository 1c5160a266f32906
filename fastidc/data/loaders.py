"""Records -> batches. Every random draw is a function of (seed, epoch, sample), so threads and order of decoding change nothing."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastidc.config import PAD_ID, Recipe
from fastidc.data.augment import Augmentation, mirrored, unchanged
from fastidc.data.images import Pixels, check_file
from fastidc.data.patience import Pool, under_way
from fastidc.data.random import briefly, generator
from fastidc.data.records import PairRecord
from fastidc.errors import FastidcError
from fastidc.packed import PackedCaptions, PackedText
from fastidc.packed import moved as moved_tensors
from fastidc.picked import Picked
from fastidc.tokenizer import Tokenizer, left_right_swapped

_LOOKS_AHEAD = 64  # files a thread


@dataclass(frozen=True)
class PairBatch:
    """What every loader yields. K images a sample: before first; P = K - 1 pairs, each (before, image k)."""

    images: Tensor | Picked  # uint8 [B, K, H, W, 3], or as many by their place in a store, or to be augmented
    ids: list[str]
    text: PackedText | None = None  # adaptation: B captions, of (before, after)
    input_ids: Tensor | None = None  # int64 [B, P, R, T], captioning: start + words of R captions a pair
    target_ids: Tensor | None = None  # int64 [B, P, R, T]: words + end, padded with 0
    captions: PackedCaptions | None = None  # the same two without padding, where they are packed: see `packed`

    def __len__(self) -> int:
        return len(self.ids)

    def chunks(self, size: int) -> Iterator["PairBatch"]:
        """The samples in order, ``size`` at a time. On the host, where the captions' lengths can be read."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            parts = {name: None if (x := getattr(self, name)) is None else x[rows] for name in ("input_ids", "target_ids")}
            text = None if self.text is None else self.text[rows]
            yield PairBatch(self.images[rows], self.ids[rows], text=text, **parts)

    def packed(self) -> "PairBatch":
        """With packed captions in the place of padded ones, where it has any. For the host."""
        if self.input_ids is None:
            return self
        return replace(self, captions=PackedCaptions.of(self.input_ids, self.target_ids), input_ids=None, target_ids=None)

    def target_counts(self) -> Tensor:
        """How many words of each kind of pair there are to learn, int64 [P]."""
        if self.captions is None:
            return (self.target_ids != PAD_ID).sum(dim=(0, 2, 3))
        return torch.stack([(targets != PAD_ID).sum() for targets in self.captions.targets.split(self.captions.kinds)])

    def to(self, device: torch.device) -> "PairBatch":
        moved = moved_tensors(self, device)
        parts = {name: getattr(self, name) for name in ("images", "text", "captions")}
        return replace(moved, **{name: x.to(device) for name, x in parts.items() if x is not None and not isinstance(x, Tensor)})


@dataclass(frozen=True)
class Sample:
    """One sample of one epoch, drawn but not decoded."""

    id: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]  # one in adaptation; in captioning R of each pair, pair after pair
    mirrored: bool = False


def adaptation_samples(records: Sequence[PairRecord]) -> list[tuple[PairRecord, int]]:
    """One sample per sentence of a change, in the records' order (clip4idc.md 6.2)."""
    return [(record, index) for record in records for index in range(len(record.captions))]


def draw_adaptation(sample: tuple[PairRecord, int], recipe: Recipe, epoch: int) -> Sample:
    """(before, after) with its sentence; the distractor may stand in for the before-image."""
    record, index = sample
    name = f"{record.id}#{index}"
    rng = briefly(recipe.seed, "adapt", epoch, name)
    swap, mirror = rng.random(2)
    before = record.distractor if record.distractor is not None and swap < recipe.swap_distractor else record.before
    return _mirrored(Sample(name, (before, record.after), (record.captions[index],)), mirror < recipe.flip)


def draw_captioning(record: PairRecord, recipe: Recipe, epoch: int) -> Sample:
    """(before, after, distractor) with sentences of the change and of no change; without a distractor one pair."""
    rng = briefly(recipe.seed, "finetune", epoch, record.id)
    kinds = [record.captions] if record.distractor is None else [record.captions, record.no_change_captions]
    captions = []
    for sentences in kinds:  # distinct ones as far as there are enough
        order = rng.permutation(len(sentences))
        captions += [sentences[order[i % len(sentences)]] for i in range(recipe.captions_per_pair)]
    return _mirrored(Sample(record.id, record.images, tuple(captions)), rng.random() < recipe.flip)


def _mirrored(sample: Sample, mirror: bool) -> Sample:
    if not mirror:
        return sample
    return replace(sample, captions=tuple(left_right_swapped(caption) for caption in sample.captions), mirrored=True)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its samples, int64 [count]."""
    return generator(seed, "order", epoch).permutation(count)


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [len(rows), longest], filled up with the pad id."""
    out = np.full((len(rows), max(len(row) for row in rows)), PAD_ID, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


@dataclass
class Meter:
    """How fast images came, and how long a run stood still for them."""

    images: int = 0
    seconds: float = 0.0  # of epochs, whatever else they did
    waited: float = 0.0  # of these, until a batch was there

    def summary(self) -> str:
        """ "1,234 images/s, 5% of the time spent waiting for them" """
        seconds = max(self.seconds, 1e-9)
        return f"{self.images / seconds:,.0f} images/s, {self.waited / seconds:.0%} of the time spent waiting for them"


class PairLoader:
    """Batches of an epoch, read by ``workers`` threads from any source of `Pixels`, and put together by one more thread while the training step
    runs. The source changes nothing but the speed. ``pinned``: batches lie in page-locked memory.

    ``recipe.batch_size`` samples make an optimiser's step: ``recipe.accumulate`` batches, each shared out among ``size`` processes, of
    which this one is number ``rank``. The samples of a step are the same whatever the number of processes.
    """

    def __init__(
        self,
        stage: str,
        records: Sequence[PairRecord],
        tokenizer: Tokenizer,
        images: Pixels,
        recipe: Recipe,
        workers: int = 4,
        rank: int = 0,
        size: int = 1,
        pinned: bool = False,
    ):
        self.pinned, self.meter = pinned, Meter()
        self.rank, self.stage, self.tokenizer, self.images, self.recipe, self.workers = rank, stage, tokenizer, images, recipe, workers
        self.samples: Sequence = adaptation_samples(records) if stage == "adapt" else list(records)
        self.augmentation = Augmentation.parse(recipe.augment)
        self._draw: Callable = draw_adaptation if stage == "adapt" else draw_captioning
        if len({len(record.images) for record in records}) > 1:
            raise FastidcError("some scenes have a distractor and some have none; a data set must have it for all or for none.")
        if recipe.batch_size % (recipe.accumulate * size):
            raise FastidcError(
                f"a batch of {recipe.batch_size} cannot be shared out evenly: {size} processes times {recipe.accumulate} accumulated passes "
                f"need a multiple of {recipe.accumulate * size}."
            )
        self.batch_size = recipe.batch_size // (recipe.accumulate * size)  # of this process
        self.together = self.batch_size * size
        self.batches = len(self.samples) // self.together  # an epoch's incomplete last batch is left out, as officially
        self.steps = self.batches // recipe.accumulate
        if not self.steps:
            raise FastidcError(
                f"the training split has {len(self.samples)} samples, fewer than one batch of {recipe.batch_size}; lower the batch size."
            )

    def epoch(self, epoch: int, begin: int = 0) -> Iterator[PairBatch]:
        """This process's batches of one epoch from number ``begin`` on, of ``self.batches``. What they hold depends on their number alone, so there
        is no other state, whatever the source."""
        order, first = epoch_order(len(self.samples), self.recipe.seed, epoch), self.rank * self.batch_size
        starts = [i * self.together + first for i in range(begin, self.batches)]
        chunks = [order[start : start + self.batch_size] for start in starts]

        def draw(chunk: np.ndarray) -> list[Sample]:
            return [self._draw(self.samples[i], self.recipe, epoch) for i in chunk]

        drawn = (draw(chunk) for chunk in chunks)

        def collate(samples: list[Sample], images: Tensor | Picked) -> PairBatch:
            return self._collate(samples, images, epoch)

        yield from ahead(prefetch(drawn, collate, self.images, self.workers, self.pinned), self.meter)

    def summary(self) -> str:
        """Which source is in use, and how fast it has been since the last summary."""
        said, self.meter = f"Loader: {self.images.name}; {self.meter.summary()}.", Meter()
        return said

    def _changed(self, samples: list[Sample], images: Tensor | Picked, epoch: int) -> Tensor | Picked:
        """The images as the model is to see them: mirrored here where they are this batch's own, in the host's memory, and nothing else is to be done
        to them, else with what is to be done beside them."""
        picked, flips = isinstance(images, Picked), [sample.mirrored for sample in samples]
        elsewhere = picked or images.device.type != "cpu"
        if not self.augmentation and not (elsewhere and self.recipe.flip):
            for row in (i for i, flip in enumerate(flips) if flip):
                images[row] = images[row].flip(2)  # [K, H, W, 3]: columns
            return images
        count, size = images.shape[1:3]
        if self.augmentation:
            drawn = [self.augmentation.draw(self.recipe.seed, epoch, sample.id, count, size) for sample in samples]
            parameters = np.stack(drawn)
        else:
            parameters = unchanged(len(samples), count, size)
        parameters[flips] = mirrored(parameters[flips], size)
        changed = replace(images if picked else Picked(images), augmentation=torch.from_numpy(parameters))
        return changed.pin_memory() if self.pinned else changed

    def _collate(self, samples: list[Sample], images: Tensor | Picked, epoch: int) -> PairBatch:
        images = self._changed(samples, images, epoch)
        ids, words = [sample.id for sample in samples], self.recipe.max_words
        if self.stage == "adapt":
            return PairBatch(images, ids, text=PackedText.of([self.tokenizer.text(sample.captions[0], words) for sample in samples]))
        both = [self.tokenizer.caption(caption, words) for sample in samples for caption in sample.captions]
        shape = (len(samples), -1, self.recipe.captions_per_pair)
        inputs, targets = (pad(rows).unflatten(0, shape) for rows in zip(*both, strict=True))
        return PairBatch(images, ids, input_ids=inputs, target_ids=targets)


def distinct_images(splits: Iterable[Iterable[PairRecord]]) -> list[Path]:
    """Every image once, in the order of the records, so that those of a scene are neighbours."""
    return list(dict.fromkeys(path for split in splits for record in split for path in record.images))


def check_images(paths: Sequence[Path], workers: int = 4) -> None:
    """Looks at every image file before a long run does (`fastidc.data.images.check_file`); FastidcError names the first bad one."""
    with Pool(workers) as pool:
        looked = under_way(pool, check_file, paths, _LOOKS_AHEAD * max(1, workers))
        for _ in tqdm(looked, total=len(paths), desc="check images", unit="image", leave=False):
            pass


def prefetch(
    batches: Iterator[list[Sample]],
    collate: Callable[[list[Sample], Tensor | Picked], PairBatch],
    images: Pixels,
    workers: int,
    pinned: bool = False,
) -> Iterator[PairBatch]:
    """Reads one batch ahead; an error in a file surfaces where its batch is asked for."""
    with Pool(workers) as pool:
        waiting: list[tuple[list[Sample], Callable[[], Tensor | Picked]]] = []
        for samples in batches:
            waiting.append((samples, images.start([sample.images for sample in samples], pool, pinned)))
            if len(waiting) > 1:
                ready, pixels = waiting.pop(0)
                yield collate(ready, pixels())
        for ready, pixels in waiting:
            yield collate(ready, pixels())


def ahead(batches: Iterator[PairBatch], meter: Meter | None = None) -> Iterator[PairBatch]:
    """``batches``, each next one made by a thread while the one before is in use. An error surfaces where its batch is asked for."""
    meter = Meter() if meter is None else meter
    began = time.perf_counter()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        coming = pool.submit(next, batches, None)
        while True:
            asked = time.perf_counter()
            batch = coming.result()
            meter.waited += time.perf_counter() - asked
            if batch is None:
                return
            coming = pool.submit(next, batches, None)
            meter.images += batch.images.shape[0] * batch.images.shape[1]
            yield batch
    finally:
        meter.seconds += time.perf_counter() - began
        pool.shutdown()  # where a signal ends this wait, the batches are still being made, and cannot be closed
        batches.close()


def in_order(records: Sequence[PairRecord], images: Pixels, batch_size: int, workers: int = 4, pinned: bool = False) -> Iterator[PairBatch]:
    """The pairs of ``records`` as they stand, for evaluation: images and ids only, the last batch incomplete."""
    samples = [Sample(record.id, record.images, ()) for record in records]
    chunks = (samples[i : i + batch_size] for i in range(0, len(samples), batch_size))

    def collate(part: list[Sample], pixels: Tensor | Picked) -> PairBatch:
        return PairBatch(pixels, [sample.id for sample in part])

    yield from prefetch(chunks, collate, images, workers, pinned)
