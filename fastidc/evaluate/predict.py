"""A model over a split: captions of every pair, embeddings of every pair and sentence."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastidc.data.images import ImageStore
from fastidc.data.loaders import in_order, pad
from fastidc.data.records import PairRecord
from fastidc.tokenizer import Tokenizer


def references_of(records: Iterable[PairRecord]) -> dict[str, list[str]]:
    """image_id -> sentences, change pairs first, then the distractor pairs as ``<id>_n`` (clip4idc.md 6.5)."""
    records = list(records)
    references = {record.id: list(record.captions) for record in records}
    references.update({record.no_change_id: list(record.no_change_captions) for record in records if record.distractor is not None})
    return references


def _encoded(
    model, records: Sequence[PairRecord], images: ImageStore, batch_size: int, bar, with_tokens: bool
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    device = next(model.parameters()).device
    for batch in in_order(records, images, batch_size):
        embedding, tokens = model.encode_batch(batch.images.to(device), with_tokens)
        yield batch.ids, embedding, tokens
        if bar is not None:
            bar.update(embedding.shape[0] * embedding.shape[1])


@torch.no_grad()
def predict_captions(
    model, tokenizer: Tokenizer, records: Sequence[PairRecord], images: ImageStore, *, batch_size: int = 64, max_length: int = 32, bar=None
) -> dict[str, str]:
    """image_id -> greedy caption for every pair of ``records``, ordered as `references_of`. The model must be in evaluation mode."""
    change, no_change = {}, {}
    for ids, _, tokens in _encoded(model, records, images, batch_size, bar, True):
        pairs = tokens.shape[1]
        rows, _ = model.generate_from_tokens(tokens.flatten(0, 1), max_length)
        texts = [tokenizer.decode(row) for row in rows.tolist()]
        for i, name in enumerate(ids):
            change[name] = texts[i * pairs]
            if pairs > 1:
                no_change[f"{name}_n"] = texts[i * pairs + 1]
    return {**change, **no_change}


@torch.no_grad()
def embed_split(
    model, tokenizer: Tokenizer, records: Sequence[PairRecord], images: ImageStore, *, max_words: int, batch_size: int = 64, bar=None
) -> tuple[Tensor, Tensor]:
    """similarity [T, P] fp32 of every change sentence with every (before, after) pair, and text_to_pair [T] int64.

    Equal sentences are encoded once, so their scores tie exactly.
    """
    device = next(model.parameters()).device
    pairs = torch.cat([embedding[:, 0].float() for _, embedding, _ in _encoded(model, records, images, batch_size, bar, False)])
    sentences = [caption for record in records for caption in record.captions]
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(sentences))}
    ids = [tokenizer.text(caption, max_words) for caption in distinct]
    text = torch.cat([model.encode_text(pad(ids[i : i + 512]).to(device)).float() for i in range(0, len(ids), 512)])
    similarity = model.similarity(text, pairs)[torch.tensor([distinct[caption] for caption in sentences], device=device)]
    text_to_pair = torch.tensor([row for row, record in enumerate(records) for _ in record.captions])
    return similarity.cpu(), text_to_pair
