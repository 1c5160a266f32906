"""What every kind of decoding shares: the pair's memory, the cache of earlier words, and the step from one word to the next."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastidc.generate.words import top_words


class Decoder(NamedTuple):
    """A `fastidc.model.captioner.Captioner` in evaluation mode, with the text tower's tables that it uses."""

    captioner: Any
    words: Tensor  # [V, E]
    positions: Tensor  # [P, E]
    start_id: int
    end_id: int

    def tensors(self) -> list[Tensor]:
        """Everything that a step reads of the model."""
        return [*self.captioner.parameters(), self.words, self.positions]


class Memory:
    """What is computed once per pair, and what is kept of the words so far; ``beams`` captions of a pair read one memory.

    tokens [N, M, E]. Memory [2, N, H, M, D] and caches [2, N * beams, H, max_length, D], keys and values, of every decoder layer.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, max_length: int, beams: int):
        captioner = decoder.captioner
        pairs = zip(captioner.decoder, captioner.encode(tokens), strict=True)
        self.memory = [layer.keys_and_values(encoded) for layer, encoded in pairs]
        first = self.memory[0]
        _, _, heads, _, size = first.shape
        self.caches = [first.new_zeros(2, len(tokens) * beams, heads, max_length, size) for _ in self.memory]
        # autocast would cast a frozen word table at every step
        self.words, self.bias = decoder.words.to(first.dtype), captioner.head_bias.to(first.dtype)
        # a position that is a tensor is read by the compiled step, which serves all of them
        self.places = torch.arange(max_length, device=tokens.device)


Next = Callable[..., tuple[Tensor, Tensor]]


def next_words(decoder: Decoder, memory: Memory, last: Tensor, position: int, count: int) -> tuple[Tensor, Tensor]:
    """last [R, 1], the words at ``position`` -> log-probabilities and ids of the ``count`` likeliest words after them, [R, count].

    Keys and values of ``last`` go into the caches; those of earlier positions must be there.
    """
    return _step(decoder.captioner, decoder.words, decoder.positions, memory, last, position, count)


def compiled_next_words(decoder: Decoder, memory: Memory, last: Tensor, position: int, count: int) -> tuple[Tensor, Tensor]:
    """`next_words` through torch.compile: the position is a tensor and later ones are masked, so that one function serves them all.
    It is compiled anew for another number of rows."""
    place = memory.places[position : position + 1]
    # one graph per bucket and captioner is meant, and the default limit is fewer
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        return _compiled()(decoder.captioner, decoder.words, decoder.positions, memory, last, place, count)


def _step(
    captioner, table: Tensor, positions: Tensor, memory: Memory, last: Tensor, position: int | Tensor, count: int
) -> tuple[Tensor, Tensor]:
    here = positions[position : position + 1] if isinstance(position, int) else positions.index_select(0, position)
    x = captioner.embed(last, table, here)
    for layer, cache, pair in zip(captioner.decoder, memory.caches, memory.memory, strict=True):
        x = layer.step(x, cache, position, pair)
    return top_words(captioner.transform(x[:, 0]), memory.words, memory.bias, count)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_step, dynamic=False, fullgraph=True)
