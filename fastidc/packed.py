"""Captions end to end, without padding."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastidc.config import PAD_ID
from fastidc.errors import FastidcError


@dataclass(frozen=True)
class PackedText:
    """S captions of T tokens in all; each ends with its end token.

    Exact for the text tower: it is causal, so nothing that would come after an end token could reach it. Made and checked on the host, where
    the lengths are known, so that nothing later has to wait for a GPU to tell them.
    """

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], each token's place in its caption
    cu_seqlens: Tensor  # int32 [S+1], caption s is rows cu_seqlens[s] to cu_seqlens[s+1]
    longest: int  # tokens of the longest caption

    @classmethod
    def of(cls, captions: Sequence[Sequence[int]]) -> "PackedText":
        """Token ids of S captions, start and end tokens included. FastidcError names one that is empty."""
        for index, caption in enumerate(captions):
            if not len(caption):
                raise FastidcError(f"caption {index} has no tokens; even an empty sentence has a start and an end token.")
        lengths = [len(caption) for caption in captions]
        return cls(
            ids=torch.tensor([token for caption in captions for token in caption], dtype=torch.long),
            positions=torch.tensor([place for length in lengths for place in range(length)], dtype=torch.long),
            cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            longest=max(lengths, default=0),
        )

    @classmethod
    def from_padded(cls, ids: Tensor) -> "PackedText":
        """ids [S, L] int, each row's end token its largest id, as `CLIP4IDC.encode_text` reads it; waits for a GPU if they are on one."""
        return cls.of([row[: row.index(max(row)) + 1] for row in ids.tolist()])

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __getitem__(self, rows: slice) -> "PackedText":
        """Captions ``rows``, neighbours; reads the offsets, so it is for the host."""
        first, last, _ = rows.indices(len(self))
        ends = self.cu_seqlens[first : max(first, last) + 1]
        tokens = slice(int(ends[0]), int(ends[-1]))
        longest = int(ends.diff().max()) if len(ends) > 1 else 0
        return replace(self, ids=self.ids[tokens], positions=self.positions[tokens], cu_seqlens=ends - ends[0], longest=longest)

    @property
    def ends(self) -> Tensor:
        """The rows of the end tokens, int32 [S]."""
        return self.cu_seqlens[1:] - 1

    def padded(self, length: int | None = None) -> Tensor:
        """ids [S, length], filled up with the pad id; ``length`` is that of the longest caption where none is given."""
        out = self.ids.new_full((len(self), length or self.longest), PAD_ID)
        row = torch.arange(len(self), device=self.ids.device).repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.ids))
        return out.index_put((row, self.positions), self.ids)

    def to(self, device: torch.device | str) -> "PackedText":
        tensors = {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
