"""The pairs of a page: which of them, what is said of each, and one pass of the model over them for its maps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastidc.data.records import PairRecord
from fastidc.describe.attention_maps import Maps, encode_with_maps
from fastidc.describe.loading import Ready
from fastidc.describe.overlay import overlaid
from fastidc.describe.pixels import batches
from fastidc.errors import FastidcError
from fastidc.evaluate.captions import CHANGE_TYPES, parse_change
from fastidc.report.thumbnails import Thumbnail, budget, mosaic, read_picture, thumbnail

NO_CHANGE = "no change"
_BATCH = 16
_IMAGES = 3  # of a card
_HIT_SIDE = 200  # pixels of a pair in the list of a query


@dataclass(frozen=True)
class Pair:
    """A pair as the page needs it; type: `NO_CHANGE` for a scene beside its distractor, "" where the data have no types."""

    id: str
    before: Path
    after: Path
    references: tuple[str, ...]
    type: str
    changed: bool


def pairs_of(records: Iterable[PairRecord], no_change: bool = True) -> dict[str, Pair]:
    """image_id -> pair, change pairs first, then, unless ``no_change`` is false, the distractor pairs."""
    change, none = {}, {}
    for record in records:
        change[record.id] = Pair(record.id, record.before, record.after, record.captions, record.type or "", True)
        if record.distractor is not None and no_change:
            other = Pair(record.no_change_id, record.before, record.distractor, record.no_change_captions, NO_CHANGE, False)
            none[other.id] = other
    return change | none


def drawn(ids: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """``count`` of ``ids`` in their order, all where they are fewer. Drawn, not every n-th: types and kinds of pairs may come in turns."""
    if len(ids) <= count:
        return list(ids)
    places = np.random.default_rng(seed).choice(len(ids), count, replace=False)
    return [ids[place] for place in sorted(places.tolist())]


def judge(caption: str, pair: Pair, typed: bool, both_kinds: bool) -> bool | None:
    """Whether a caption tells the right kind of change.

    typed: the data have CLEVR's types, and the type is judged. both_kinds: there are pairs without a change, and otherwise change or none
    is judged. None where neither is so.
    """
    told = parse_change(caption)
    if typed and (not pair.changed or pair.type in CHANGE_TYPES):
        return told == (pair.type if pair.changed else "none")
    return (told != "none") == pair.changed if both_kinds else None


@dataclass(frozen=True)
class Pictures:
    before: Thumbnail
    after: Thumbnail
    map: Thumbnail | None
    hit: Thumbnail | None  # before and after in one, for the lists of queries
    embedding: Tensor | None  # [E]


def pictures(pairs: Sequence[Pair], ready: Ready | None, *, maps: bool, hits: bool = False, bar: Any = None) -> Iterator[Pictures]:
    """What is seen of each pair. ready: the model, None where there is none, and so neither maps nor embeddings.

    maps: the model has maps. hits: pictures for lists of queries too. FastidcError names an image that cannot be read.
    """
    most = budget(len(pairs) * (_IMAGES + hits))
    for first in range(0, len(pairs), _BATCH):
        chunk = pairs[first : first + _BATCH]
        embeddings, found = _looked(chunk, ready, maps)
        for row, pair in enumerate(chunk):
            before, after = (read_picture(path, pair.id, which) for path, which in ((pair.before, "before"), (pair.after, "after")))
            laid = None if found is None else thumbnail(_laid(before, after, found[row]), most, kind="WEBP")
            hit = None
            if hits:
                hit = thumbnail(mosaic([[before, after]], 2 * before.width, before.height), most, side=_HIT_SIDE, kind="WEBP")
            shown = [thumbnail(picture, most) for picture in (before, after)]
            yield Pictures(*shown, laid, hit, None if embeddings is None else embeddings[row])
            if bar is not None:
                bar.update()


def _looked(chunk: Sequence[Pair], ready: Ready | None, maps: bool) -> tuple[Tensor | None, Maps | None]:
    """Embeddings [B, E] fp32 and maps of ``chunk``."""
    if ready is None:
        return None, None
    size = ready.model.config.image_size
    (batch,) = batches([(pair.before, pair.after) for pair in chunk], size, len(chunk), 2)
    for pair, error in zip(chunk, batch.errors, strict=True):
        if error is not None:
            raise FastidcError(f"pair {pair.id!r}: {error}")
    images = batch.images.to(ready.device)
    with ready.asked():
        embedding, found = encode_with_maps(ready.model, images) if maps else (ready.model.encode_batch(images, False)[0][:, 0], None)
    return torch.nn.functional.normalize(embedding.float(), dim=-1).cpu(), found


def _laid(before, after, maps: Maps):
    """Both layers' maps over both images: before | after, the intra layer above the inter layer."""
    rows = []
    for _, *heats in maps.layers:
        peak = max(float(heat.max()) for heat in heats)
        rows.append([overlaid(picture, heat, peak) for picture, heat in zip((before, after), heats, strict=True)])
    return mosaic(rows, 2 * before.width, 2 * before.height)
