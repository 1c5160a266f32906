"""Beam search, all of it in tensors: no step asks the device anything."""

import torch
from torch import Tensor

from fastidc.generate.step import Decoder, Memory, Next

_NEVER = float("-inf")


class Beams:
    """One batch's beam search; see `Greedy` for how it is driven.

    A caption's score is the sum of its words' log-probabilities, the end token's among them, over length ** ``length_penalty``, the
    length counting the end token. A beam that chooses the end token leaves the running ones and competes with its score; at
    ``max_length`` the running ones compete as they stand. A pair is done when no running beam can beat its best ended one: words to come
    add at most 0 to the sum, and a sum below 0 is worth most over the greatest length, so that running sum / max_length **
    ``length_penalty`` bounds what a beam may still become. The pad id 0 is the word "!" and may be chosen like any other.
    Without ``empty`` no caption ends before its first word.
    """

    stop_early = True

    def __init__(self, max_length: int, beams: int, length_penalty: float, empty: bool = True):
        self.max_length, self.beams, self.length_penalty, self.empty = max_length, beams, length_penalty, empty

    def start(self, decoder: Decoder, tokens: Tensor, live: Tensor) -> None:
        pairs, beams, length, device = len(tokens), self.beams, self.max_length, tokens.device
        self.memory = Memory(decoder, tokens, length, beams)
        self.last = torch.full((pairs * beams, 1), decoder.start_id, dtype=torch.long, device=device)
        padding = torch.arange(pairs, device=device) >= live
        # all beams of a pair begin alike, so one of them runs
        self.sums = torch.full((pairs, beams), _NEVER, device=device)
        self.sums[:, 0] = torch.zeros_like(padding, dtype=torch.float).masked_fill(padding, _NEVER)
        self.ids = torch.zeros(pairs, beams, length, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(pairs, beams, length, device=device)
        self.best = torch.full((pairs,), _NEVER, device=device)  # the best ended caption's score, ids and log-probabilities
        self.best_ids = torch.zeros(pairs, length, dtype=torch.long, device=device)
        self.best_log_probs = torch.zeros(pairs, length, device=device)
        self.first = torch.arange(pairs, device=device)[:, None] * beams  # a pair's first row in the caches
        self.done = padding.all()

    def step(self, decoder: Decoder, position: int, following: Next) -> None:
        pairs, beams = self.sums.shape
        vocabulary = len(decoder.words)
        # of 2k candidates at most k are ends, so k are left to run on
        each = min(2 * beams, vocabulary)
        log_prob, word = (x.view(pairs, beams, each) for x in following(decoder, self.memory, self.last, position, each))
        if position == 0 and not self.empty:
            log_prob = log_prob.masked_fill(word == decoder.end_id, _NEVER)
        sums, at = (self.sums[..., None] + log_prob).flatten(1).topk(2 * beams)  # [N, 2k]
        word, log_prob, beam = word.flatten(1).gather(1, at), log_prob.flatten(1).gather(1, at), at // each
        ends = word == decoder.end_id
        self._keep_best(position, sums.masked_fill(~ends, _NEVER), beam, word, log_prob)
        kept, at = sums.masked_fill(ends, _NEVER).topk(beams)
        word, log_prob, beam = (x.gather(1, at) for x in (word, log_prob, beam))
        self._reorder(beam, position)
        self.ids[:, :, position], self.log_probs[:, :, position] = word, log_prob
        self.last.copy_(word.view(-1, 1))
        if position + 1 == self.max_length:
            self._keep_best(position, kept, torch.arange(beams, device=kept.device).expand(pairs, -1), word, log_prob)
        bound = kept[:, 0] / self.max_length**self.length_penalty
        over = self.best >= bound
        self.sums.copy_(kept.masked_fill(over[:, None], _NEVER))
        self.done.copy_(over.all())

    def result(self) -> tuple[Tensor, Tensor]:
        """ids [N, max_length] int64 of every pair's best caption and the log-probability of each [N, max_length] fp32"""
        return self.best_ids.clone(), self.best_log_probs.clone()

    def _keep_best(self, position: int, sums: Tensor, beam: Tensor, word: Tensor, log_prob: Tensor) -> None:
        """Candidates [N, C], each the beam that it continues and its word at ``position``: the best of them, where it beats the best so far."""
        score, at = (sums / (position + 1) ** self.length_penalty).max(dim=1, keepdim=True)
        better = score > self.best[:, None]  # [N, 1]
        row = beam.gather(1, at)[..., None].expand(-1, -1, self.max_length)
        for best, own, last in ((self.best_ids, self.ids, word), (self.best_log_probs, self.log_probs, log_prob)):
            caption = own.gather(1, row)[:, 0]
            caption[:, position : position + 1] = last.gather(1, at)
            best.copy_(torch.where(better, caption, best))
        self.best.copy_(torch.maximum(self.best, score[:, 0]))

    def _reorder(self, beam: Tensor, position: int) -> None:
        """beam [N, k]: row i of a pair's captions and caches becomes what row beam[i] was."""
        whole = beam[..., None].expand(-1, -1, self.max_length)
        self.ids.copy_(self.ids.gather(1, whole))
        self.log_probs.copy_(self.log_probs.gather(1, whole))
        rows = (self.first + beam).flatten()
        for cache in self.memory.caches:
            cache[:, :, :, : position + 1] = cache[:, rows, :, : position + 1]
