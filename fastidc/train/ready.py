"""What a training step reads: batches cut into chunks, their captions packed and, where shapes must be few, filled up."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastidc.data.loaders import PairBatch
from fastidc.packed import PackedCaptions, caption_lengths, length_bucket, token_bucket

Ready = tuple[tuple[PairBatch, ...], ...]
"""Of each batch of a step, its chunks, on the device."""


def make_ready(batches: Sequence[PairBatch], device: torch.device, micro_batch: int | None = None, positions: int | None = None) -> Ready:
    """``batches`` of one step, on the host, in chunks of ``micro_batch`` samples at most.

    positions: those of the model, where captions are to be filled up to one of few sizes (`fastidc.packed.token_bucket`), the same for
    all chunks. None: they stay as long as they are.
    """
    chunked = [list(batch.chunks(micro_batch)) if micro_batch is not None and micro_batch < len(batch) else [batch] for batch in batches]
    chunks = [chunk for part in chunked for chunk in part]
    if chunks[0].text is not None and positions is not None:
        size = token_bucket(max(len(chunk.text.ids) for chunk in chunks))
        longest = length_bucket(max(chunk.text.longest for chunk in chunks), positions)
        chunked = [[replace(chunk, text=chunk.text.filled(size, longest)) for chunk in part] for part in chunked]
    elif chunks[0].target_ids is not None:
        sizes = _sizes(chunks, positions)
        chunked = [[_packed(chunk, *sizes) for chunk in part] for part in chunked]
    return tuple(tuple(chunk.to(device) for chunk in part) for part in chunked)


def _packed(batch: PairBatch, kinds: Sequence[int], longest: int) -> PairBatch:
    captions = PackedCaptions.of(batch.input_ids, batch.target_ids, kinds, longest)
    return replace(batch, captions=captions, input_ids=None, target_ids=None)


def _sizes(chunks: Sequence[PairBatch], positions: int | None) -> tuple[Sequence[int], int]:
    """What `PackedCaptions.of` takes as ``kinds`` and ``longest``."""
    if positions is None:
        return (), 0
    lengths = [caption_lengths(chunk.target_ids) for chunk in chunks]
    tokens = torch.stack([length.sum(dim=(0, 2)) for length in lengths]).amax(dim=0)  # [P]
    return [token_bucket(size) for size in tokens.tolist()], length_bucket(max(int(length.max()) for length in lengths), positions)
