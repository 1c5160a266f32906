"""A model over a split: captions of every pair, embeddings of every pair and sentence."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastidc.data.images import Pixels
from fastidc.data.loaders import PairBatch, ahead, in_order
from fastidc.data.records import PairRecord
from fastidc.evaluate.retrieval import unique_sentences
from fastidc.packed import PackedText
from fastidc.tokenizer import Tokenizer


def references_of(records: Iterable[PairRecord]) -> dict[str, list[str]]:
    """image_id -> sentences, change pairs first, then the distractor pairs as ``<id>_n`` (clip4idc.md 6.5)."""
    records = list(records)
    references = {record.id: list(record.captions) for record in records}
    references.update({record.no_change_id: list(record.no_change_captions) for record in records if record.distractor is not None})
    return references


def _ready(records: Sequence[PairRecord], images: Pixels, batch_size: int, pinned: bool) -> Iterator[PairBatch]:
    """`in_order`, each next batch put together by a thread while the one before is in use; ``pinned`` for a copy that a GPU need not wait
    for. An error in a file surfaces where its batch is asked for."""
    yield from ahead(in_order(records, images, batch_size, pinned=pinned))


def _encoded(
    model, records: Sequence[PairRecord], images: Pixels, batch_size: int, bar, with_tokens: bool
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    device = next(model.parameters()).device
    for batch in _ready(records, images, batch_size, pinned=device.type == "cuda"):
        embedding, tokens = model.encode_batch(batch.images.to(device, non_blocking=True), with_tokens)
        yield batch.ids, embedding, tokens
        if bar is not None:
            bar.update(embedding.shape[0] * embedding.shape[1])


@torch.no_grad()
def predict_captions(
    model,
    tokenizer: Tokenizer,
    records: Sequence[PairRecord],
    images: Pixels,
    *,
    batch_size: int = 64,
    max_length: int = 32,
    beams: int = 1,
    length_penalty: float = 0.0,
    bar=None,
) -> dict[str, str]:
    """image_id -> caption for every pair of ``records``, ordered as `references_of`; greedy by default, see `CLIP4IDC.generate_from_tokens`.
    The model must be in evaluation mode."""
    change, no_change = {}, {}
    for ids, _, tokens in _encoded(model, records, images, batch_size, bar, True):
        pairs = tokens.shape[1]
        rows, _ = model.generate_from_tokens(tokens.flatten(0, 1), max_length, beams, length_penalty=length_penalty)
        texts = [tokenizer.decode(row) for row in rows.tolist()]
        for i, name in enumerate(ids):
            change[name] = texts[i * pairs]
            if pairs > 1:
                no_change[f"{name}_n"] = texts[i * pairs + 1]
    return {**change, **no_change}


@torch.no_grad()
def embed_pairs(model, records: Sequence[PairRecord], images: Pixels, *, batch_size: int = 64, bar=None) -> Tensor:
    """[P, E] fp32 on the CPU, the embedding of every (before, after). The model must be in evaluation mode."""
    parts = [embedding[:, 0].float().cpu() for _, embedding, _ in _encoded(model, records, images, batch_size, bar, False)]
    return torch.cat(parts) if parts else torch.empty(0, model.config.embed_dim)


@torch.no_grad()
def embed_sentences(model, tokenizer: Tokenizer, sentences: Sequence[str], *, max_words: int, batch_size: int = 512) -> Tensor:
    """[T, E] fp32 on the CPU. Give each sentence once, so that equal ones have equal scores."""
    device = next(model.parameters()).device
    ids = [tokenizer.text(sentence, max_words) for sentence in sentences]
    parts = [model.encode_text(PackedText.of(ids[i : i + batch_size]).to(device)).float().cpu() for i in range(0, len(ids), batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, model.config.embed_dim)


def sentences_of(records: Sequence[PairRecord]) -> tuple[list[str], Tensor, Tensor]:
    """The distinct change sentences of ``records`` [U], and for each of their T sentences its row among them and its pair (int64 [T])."""
    distinct, rows = unique_sentences(caption for record in records for caption in record.captions)
    owner = torch.tensor([row for row, record in enumerate(records) for _ in record.captions])
    return distinct, torch.from_numpy(rows), owner
