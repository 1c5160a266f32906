"""Batches as a run has them, without end, from a cache of pictures that the bench makes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.case import Case

LOADERS = ("resident", "memory", "cache")
PICTURES = 64  # different ones; the cache has each many times
_SENTENCES = tuple(
    f"the {size} {colour} {what} {happened}"
    for size in ("large", "small")
    for colour in ("red", "green", "blue", "gray")
    for what in ("metal ball", "rubber cube")
    for happened in ("has been moved to the left", "is no longer there", "has turned yellow")
)
_SAME = ("there is no change", "the scene remains the same", "nothing was modified")


def _loader(case: Case, kind: str):
    from bench.families.loader import files
    from bench.peers.cached import cache_of
    from fastidc.config import PRESETS
    from fastidc.data.cache import Cache
    from fastidc.data.loaders import PairLoader
    from fastidc.data.records import PairRecord
    from fastidc.data.resident import ResidentImages
    from fastidc.data.sources import CachedImages
    from fastidc.tokenizer import Tokenizer

    config, stage, samples = (case.shape[name] for name in ("config", "stage", "samples"))
    file, _ = cache_of(files("png", PICTURES, 48, 32), config.image_size, False, max(case.shape["images"], 3 * samples + 3))
    cache = Cache(file)
    names = [Path(f"{row}.png") for row in range(len(cache.pixels))]
    rows, draw = {name: row for row, name in enumerate(names)}, np.random.default_rng(0)
    scenes = draw.permutation(len(names) - len(names) % 3).reshape(-1, 3)
    records = [
        PairRecord(str(i), names[a], names[b], (_SENTENCES[i % len(_SENTENCES)],), names[c], (_SAME[i % len(_SAME)],))
        for i, (a, b, c) in enumerate(scenes.tolist())
    ]
    device, cuda = torch.device(case.device), case.device == "cuda"
    if kind == "resident":
        source = ResidentImages(cache, rows, device)
    else:
        source = CachedImages(cache, rows, kind == "memory", device)
    recipe = dataclasses.replace(getattr(PRESETS["clevr"], stage), batch_size=samples)
    words = _SENTENCES + _SAME
    tokenizer = Tokenizer() if config.vocab_size > len(words) * 20 else _Few(config, words)
    return PairLoader(stage, records, tokenizer, source, recipe, workers=4, pinned=cuda), cache


class _Few:
    """A tokenizer of a model whose table is too small for CLIP's: every word is one of its ids."""

    def __init__(self, config, sentences: tuple[str, ...]):
        words = sorted({word for sentence in sentences for word in sentence.split()})
        self._ids = {word: 1 + i % (config.vocab_size - 3) for i, word in enumerate(words)}
        self._start, self._end = config.start_id, config.end_id

    def text(self, sentence: str, length: int) -> list[int]:
        return [self._start, *(self._ids[word] for word in sentence.split())][: length - 1] + [self._end]

    def caption(self, sentence: str, length: int) -> tuple[list[int], list[int]]:
        ids = self.text(sentence, length)
        return ids[:-1], ids[1:]


def batches(case: Case, kind: str) -> Iterator:
    """`fastidc.data.PairBatch`es, epoch after epoch."""
    loader, _ = _loader(case, kind)
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def wrong_pixels(case: Case, kind: str) -> int:
    """In the first batch, how many values are not those of the rows that its samples name."""
    from fastidc import ops
    from fastidc.picked import Picked

    loader, cache = _loader(case, kind)
    batch = next(iter(loader.epoch(0)))
    images, patch = batch.images, case.shape["config"].patch_size
    scenes = {record.id: record for record in _records(loader)}
    shown = [scenes[name.partition("#")[0]].images for name in batch.ids]
    want = np.stack([[np.array(cache.pixels[int(path.stem)]) for path in paths] for paths in shown])
    given = images.to(case.device).flat() if isinstance(images, Picked) else (images.to(case.device).flatten(0, 1), None, None)
    found = ops.patches(given[0], given[1], patch, augmentation=given[2], dtype=torch.float32)
    count = images.shape[1]
    want = torch.from_numpy(want).to(case.device)
    if count == 2:  # adaptation shows the distractor for the before-image now and then
        first = ops.patches(want[:, 0].contiguous(), None, patch, dtype=torch.float32)
        other = ops.patches(want[:, 2].contiguous(), None, patch, dtype=torch.float32)
        found = found.unflatten(0, (-1, 2))
        after = ops.patches(want[:, 1].contiguous(), None, patch, dtype=torch.float32)
        wrong_first = torch.minimum((found[:, 0] != first).sum((1, 2)), (found[:, 0] != other).sum((1, 2))).sum()
        return int(wrong_first + (found[:, 1] != after).sum())
    return int((found != ops.patches(want.flatten(0, 1), None, patch, dtype=torch.float32)).sum())


def _records(loader) -> list:
    return [sample[0] if isinstance(sample, tuple) else sample for sample in loader.samples]
