"""From a pair's tokens to captions: greedy and beam search over a captioner with a static cache."""

import torch
from torch import Tensor

from fastidc.errors import FastidcError
from fastidc.generate.beams import Beams
from fastidc.generate.greedy import Greedy
from fastidc.generate.plan import plan_for
from fastidc.generate.step import Decoder, compiled_next_words, next_words

__all__ = ["Decoder", "check", "decode"]

MOST_PENALTY = 10  # length ** it is still a number in fp32, and nobody has use for more


def check(pairs: int, max_length: int, beams: int, length_penalty: float, stop_early: bool, positions: int, vocabulary: int) -> None:
    """FastidcError says what cannot be decoded so."""
    if not pairs:
        raise FastidcError("there is no pair to caption: the batch is empty.")
    if max_length < 1:
        raise FastidcError(f"max_length must be at least 1, got {max_length}.")
    if max_length > positions:
        raise FastidcError(f"max_length {max_length} exceeds the model's {positions} positions; ask for fewer words.")
    if beams < 1:
        raise FastidcError(f"beams must be at least 1, which is greedy decoding; got {beams}.")
    if beams > vocabulary:
        raise FastidcError(
            f"beams {beams} exceeds the vocabulary of {vocabulary} words, so a first word could not fill them; ask for fewer."
        )
    if beams > 1 and not stop_early:
        raise FastidcError("stop_early=False is the official greedy loop's fixed number of steps; it has no meaning with beams > 1.")
    if not 0 <= length_penalty <= MOST_PENALTY:
        raise FastidcError(f"length_penalty must lie in 0 to {MOST_PENALTY}, got {length_penalty}.")
    if length_penalty and beams == 1:
        raise FastidcError(f"length_penalty {length_penalty} chooses among beams, and there is one; give more beams, or leave it out.")


@torch.no_grad()
def decode(
    decoder: Decoder,
    tokens: Tensor,
    max_length: int,
    *,
    beams: int = 1,
    length_penalty: float = 0.0,
    stop_early: bool = True,
    graphs: bool | None = None,
    compiled: bool = False,
    empty: bool = True,
) -> tuple[Tensor, Tensor]:
    """tokens [B, M, E] of the pairs, B > 0 -> ids [B, max_length] int64 without the start token, and the log-probability of each
    [B, max_length] fp32, both zero after the end token; a caption's log-probability is the sum of its row.

    One beam is greedy decoding. ``graphs``: the batch is filled up to a bucket and decoded by `Plan`, on CUDA as captured graphs; by
    default exactly there. ``compiled``: the step goes through torch.compile, also in buckets. Neither changes what is decoded. ``empty=False``:
    no caption is without a word.
    """
    following = compiled_next_words if compiled else next_words
    search = Greedy(max_length, stop_early, empty) if beams == 1 else Beams(max_length, beams, length_penalty, empty)
    if graphs is None:
        graphs = tokens.device.type == "cuda" or compiled
    if graphs:
        settings = (max_length, stop_early, beams, length_penalty, empty)
        with torch.cuda.device_of(tokens):
            return plan_for(search, decoder, tokens, following, settings)(tokens)
    search.start(decoder, tokens, torch.full((1,), len(tokens), device=tokens.device))
    for position in range(max_length):
        search.step(decoder, position, following)
        # asking a GPU costs a wait, so it is asked now and then only
        if stop_early and (tokens.device.type == "cpu" or position % 8 == 7) and bool(search.done):
            break
    return search.result()
