"""Captions end to end, without padding."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
    longest: int  # tokens of the longest caption, or more
    fillers: int = 0  # of the S sequences, those at the end that are no captions: see `filled`

    @classmethod
    def of(cls, captions: Sequence[Sequence[int]]) -> "PackedText":
        """Token ids of S captions, start and end tokens included. FastidcError names one that is empty."""
        for index, caption in enumerate(captions):
            if not len(caption):
                raise FastidcError(f"caption {index} has no tokens; even an empty sentence has a start and an end token.")
        lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
        ends = np.concatenate([[0], lengths.cumsum()])
        ids = np.fromiter(itertools.chain.from_iterable(captions), dtype=np.int64, count=int(ends[-1]))
        return cls(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(np.arange(len(ids)) - ends[:-1].repeat(lengths)),
            cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
            longest=int(lengths.max(initial=0)),
        )

    @classmethod
    def from_padded(cls, ids: Tensor) -> "PackedText":
        """ids [S, L] int, each row's end token its largest id, as `CLIP4IDC.encode_text` reads it; waits for a GPU if they are on one."""
        return cls.of([row[: row.index(max(row)) + 1] for row in ids.tolist()])

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1 - self.fillers

    def __getitem__(self, rows: slice) -> "PackedText":
        """Captions ``rows``, neighbours; reads the offsets, so it is for the host."""
        first, last, _ = rows.indices(len(self))
        ends = self.cu_seqlens[first : max(first, last) + 1]
        tokens = slice(int(ends[0]), int(ends[-1]))
        longest = int(ends.diff().max()) if len(ends) > 1 else 0
        return PackedText(self.ids[tokens], self.positions[tokens], ends - ends[0], longest)

    @property
    def ends(self) -> Tensor:
        """The rows of the captions' end tokens, int32 [S]."""
        return self.cu_seqlens[1 : len(self) + 1] - 1

    def padded(self, length: int | None = None) -> Tensor:
        """ids [S, length], filled up with the pad id; ``length`` is that of the longest caption where none is given."""
        sequences, length = len(self.cu_seqlens) - 1, length or self.longest
        out = self.ids.new_full((sequences, max(length, self.longest)), PAD_ID)  # fillers may be longer than any caption
        row = torch.arange(sequences, device=self.ids.device).repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.ids))
        return out.index_put((row, self.positions), self.ids)[: len(self), :length]

    def filled(self, tokens: int, longest: int) -> "PackedText":
        """The same captions in tensors whose sizes ``tokens`` and ``longest`` alone decide: pad tokens in sequences of their own follow, which
        nothing reads. For the host; it must be without fillers."""
        lengths = _fillers(tokens - len(self.ids), tokens, longest)
        places = torch.tensor([place for length in lengths for place in range(length)], dtype=torch.long)
        ends = self.cu_seqlens[-1] + torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return PackedText(
            ids=torch.cat([self.ids, torch.full_like(places, PAD_ID)]),
            positions=torch.cat([self.positions, places]),
            cu_seqlens=torch.cat([self.cu_seqlens, ends]),
            longest=longest,
            fillers=len(lengths),
        )

    def to(self, device: torch.device | str) -> "PackedText":
        return moved(self, device)


def moved(value, device: torch.device | str):
    """A dataclass of tensors with all of them on ``device``."""
    tensors = {field.name: x for field in fields(value) if isinstance(x := getattr(value, field.name), Tensor)}
    return replace(value, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


def _fillers(missing: int, tokens: int, longest: int) -> list[int]:
    """Lengths of the sequences that ``missing`` pad tokens make, each of ``longest`` at most: as many as could ever be needed, most of no
    tokens, because a captured step has a fixed number of them."""
    if missing < 0:
        raise ValueError(f"captions of {tokens - missing} tokens do not fit into {tokens}.")
    count = -(-tokens // longest)
    return [min(longest, max(0, missing - i * longest)) for i in range(count)]


def token_bucket(tokens: int) -> int:
    """The number of tokens that ``tokens`` are filled up to where shapes are few: 6% more at most, from 512 on."""
    step = max(32, (1 << (tokens - 1).bit_length()) // 32) if tokens else 32
    return -(-tokens // step) * step


def length_bucket(length: int, longest: int) -> int:
    """The same for the length of a batch's longest caption, of a model of ``longest`` positions; FastidcError where it has fewer."""
    if length > longest:
        raise FastidcError(f"captions of {length} tokens exceed the model's {longest} positions; lower max_words.")
    for size in (8, 16, 24, 32, 48, 64):
        if length <= size < longest:
            return size
    return longest


@dataclass(frozen=True)
class PackedCaptions:
    """What a captioner learns from, without padding: R captions of each of P kinds of pair of B samples, all of the first kind before all of
    the second.

    What a decoder does word by word it does for these N rows alone. Where all captions of a pair read it together, rows are laid out in the
    grid [B, P, R, longest] of padded captions and taken from it again: ``rows`` and ``cells`` say how. Made on the host, as `PackedText` is.
    """

    text: PackedText  # S sequences of N rows: start + words
    targets: Tensor  # int64 [N]: words + end, the pad id where there is nothing to learn
    cells: Tensor  # int64 [N], each row's place in the grid; a filler's is anybody's
    rows: Tensor  # int64 [B * P * R * longest], each cell's row; a pad's is the last of its own caption
    kinds: tuple[int, ...]  # rows of each kind of pair

    @classmethod
    def of(cls, input_ids: Tensor, target_ids: Tensor, kinds: Sequence[int] = (), longest: int = 0) -> "PackedCaptions":
        """input_ids, target_ids [B, P, R, T] int, filled up with the pad id, on the host. A caption ends with its last target that is no pad:
        the pad id is also the word "!", which a caption may have inside.

        ``kinds`` and ``longest``: that many rows of each kind of pair and that many cells a caption, the rest filled with what nothing reads;
        they and [B, P, R] are then all that decides the tensors' sizes. By default as few as can be.
        """
        samples, pairs, repeats, given = target_ids.shape
        lengths = caption_lengths(target_ids)  # [B, P, R]
        longest = longest or int(lengths.max())
        if longest > given:
            input_ids, target_ids = (F.pad(ids, (0, longest - given), value=PAD_ID) for ids in (input_ids, target_ids))
        place = torch.arange(longest)
        cell = torch.arange(lengths.numel() * longest).view(*lengths.shape, longest)
        ids, targets, positions, cells, sizes = [], [], [], [], []  # kind after kind
        for kind in range(pairs):
            taken = place < lengths[:, kind, :, None]  # [B, R, longest]
            filler = _fillers(kinds[kind] - int(taken.sum()), kinds[kind], longest) if kinds else []
            fill = torch.cat([place[:length] for length in filler]) if filler else place[:0]
            pads = torch.full_like(fill, PAD_ID)
            ids += [input_ids[:, kind, :, :longest][taken], pads]
            targets += [target_ids[:, kind, :, :longest][taken], pads]
            positions += [place.expand_as(taken)[taken], fill]
            cells += [cell[:, kind][taken], fill]
            sizes.append(torch.cat([lengths[:, kind].flatten(), torch.tensor(filler, dtype=torch.long)]))
        offsets = F.pad(torch.cat(sizes).cumsum(0), (1, 0))
        firsts = itertools.accumulate((len(size) for size in sizes[:-1]), initial=0)  # each kind's first sequence
        starts = [offsets[first : first + samples * repeats].view(samples, repeats) for first in firsts]
        rows = torch.stack(starts, dim=1)[..., None] + torch.minimum(place, lengths[..., None] - 1)
        text = PackedText(torch.cat(ids).long(), torch.cat(positions), offsets.int(), longest)
        found = tuple(kinds) or tuple(lengths.sum(dim=(0, 2)).tolist())
        return cls(text, torch.cat(targets).long(), torch.cat(cells), rows.flatten(), found)

    def mark_dynamic(self) -> None:
        """Tells torch.compile that the number of rows may be any."""
        for x in (self.text.ids, self.text.positions, self.text.cu_seqlens, self.cells):
            torch._dynamo.mark_dynamic(x, 0)

    def to(self, device: torch.device | str) -> "PackedCaptions":
        return replace(moved(self, device), text=self.text.to(device))


def caption_lengths(target_ids: Tensor) -> Tensor:
    """target_ids [..., T], filled up with the pad id -> how many come before the fill, at least 1, int64 [...]."""
    place = torch.arange(1, target_ids.shape[-1] + 1, device=target_ids.device)
    return torch.where(target_ids != PAD_ID, place, 1).amax(dim=-1)
