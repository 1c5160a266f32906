"""CLIP's byte-pair encoding, through open_clip, and the shapes in which the two stages read a caption."""

import functools
import re
from collections.abc import Iterable, Sequence

from fastidc.config import END_ID, PAD_ID, START_ID, ModelConfig
from fastidc.errors import FastidcError


@functools.cache
def _clip():
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise FastidcError(f"the tokenizer needs open_clip, which cannot be imported ({error}); pip install open_clip_torch.") from None
    return SimpleTokenizer()


@functools.lru_cache(maxsize=1 << 17)
def _bpe(text: str) -> tuple[int, ...]:
    return tuple(_clip().encode(text))


class Tokenizer:
    """Text <-> rows of a model's token table.

    With ``vocabulary`` (ascending BPE ids, `ModelConfig.vocabulary`) row i stands for BPE id vocabulary[i] and words outside it are
    dropped; without, rows are BPE ids. Start and end are the last two rows either way.
    """

    def __init__(self, vocabulary: Sequence[int] | None = None):
        self._ids = None if vocabulary is None else list(vocabulary)
        self._rows = None if vocabulary is None else {bpe: row for row, bpe in enumerate(vocabulary)}
        self.start, self.end = (START_ID, END_ID) if vocabulary is None else (len(vocabulary) - 2, len(vocabulary) - 1)

    @classmethod
    def of(cls, config: ModelConfig) -> "Tokenizer":
        return cls(config.vocabulary)

    def encode(self, text: str) -> list[int]:
        """The words of ``text`` as rows, without start and end."""
        ids = _bpe(text)
        return list(ids) if self._rows is None else [self._rows[i] for i in ids if i in self._rows]

    def text(self, caption: str, max_words: int) -> list[int]:
        """What the text tower reads: start, at most ``max_words`` - 2 tokens, end (clip4idc.md 2, stage 1)."""
        return [self.start, *self.encode(caption)][: max_words - 1] + [self.end]

    def caption(self, caption: str, max_words: int) -> tuple[list[int], list[int]]:
        """What the captioner reads and predicts: start + tokens, tokens + end, at most ``max_words`` each (stage 2)."""
        tokens = self.encode(caption)[: max_words - 1]
        return [self.start, *tokens], [*tokens, self.end]

    def decode(self, rows: Iterable[int]) -> str:
        """Rows as generated -> the caption, cut at the end token and then at the first "!" as the official evaluation does (pad is "!")."""
        rows = [int(row) for row in rows]
        if self.end in rows:
            rows = rows[: rows.index(self.end)]
        ids = rows if self._ids is None else [self._ids[row] for row in rows]
        text = _clip().decode([i for i in ids if i != START_ID])
        return re.sub(r"\s+", " ", text.split("!")[0]).strip()

    def words(self) -> list[bytes]:
        """What each row writes, in UTF-8: joined and decoded they are `decode`'s text before it is cut. A word's end is a space, the start token
        nothing; a row may hold a part of a character."""
        clip = _clip()
        ids = range(END_ID + 1) if self._ids is None else self._ids
        written = (bytes(clip.byte_decoder[character] for character in clip.decoder[i]) for i in ids)
        return [b"" if i == START_ID else word.replace(b"</w>", b" ") for i, word in zip(ids, written, strict=True)]


def vocabulary_of(captions: Iterable[str]) -> tuple[int, ...]:
    """The BPE ids that occur in ``captions``, with pad, start and end; ascending."""
    return tuple(sorted({PAD_ID, START_ID, END_ID}.union(*(_bpe(caption) for caption in set(captions)))))


def left_right_swapped(caption: str) -> str:
    """The caption of the mirrored pair: "left" and "right" exchanged."""
    return re.sub(r"\b(left|right)\b", lambda m: "right" if m[1] == "left" else "left", caption)
