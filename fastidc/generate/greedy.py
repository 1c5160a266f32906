"""The most likely word at every step."""

import torch
from torch import Tensor

from fastidc.generate.step import Decoder, Memory, Next


class Greedy:
    """One batch's greedy decoding. Its tensors are made by `start` and written in place by `step`, so that both can be captured.

    With ``stop_early`` ids and log-probabilities are zero after the end token. Without, it is the official evaluation's fixed number of
    raw steps. The pad id 0 is the word "!" (clip4idc.md 3) and chosen like any other. Without ``empty`` no caption ends before its first word.
    """

    def __init__(self, max_length: int, stop_early: bool, empty: bool = True):
        self.max_length, self.stop_early, self.empty = max_length, stop_early, empty

    def start(self, decoder: Decoder, tokens: Tensor, live: Tensor) -> None:
        """tokens [N, M, E], of which the first ``live`` (int64 [1]) pairs count."""
        rows, device = len(tokens), tokens.device
        self.memory = Memory(decoder, tokens, self.max_length, beams=1)
        self.ids = torch.zeros(rows, self.max_length, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, self.max_length, device=device)
        self.last = torch.full((rows, 1), decoder.start_id, dtype=torch.long, device=device)
        self.ended = torch.arange(rows, device=device) >= live
        self.done = self.ended.all()

    def step(self, decoder: Decoder, position: int, following: Next) -> None:
        if position == 0 and not self.empty:
            log_prob, chosen = following(decoder, self.memory, self.last, position, 2)
            second = chosen[:, :1] == decoder.end_id
            log_prob, chosen = (torch.where(second, x[:, 1:], x[:, :1])[:, 0] for x in (log_prob, chosen))
        else:
            log_prob, chosen = (x[:, 0] for x in following(decoder, self.memory, self.last, position, 1))
        if self.stop_early:
            chosen, log_prob = chosen.masked_fill(self.ended, 0), log_prob.masked_fill(self.ended, 0)
            self.ended.logical_or_(chosen == decoder.end_id)
            self.done.copy_(self.ended.all())
        self.ids[:, position], self.log_probs[:, position] = chosen, log_prob
        self.last[:, 0] = chosen

    def result(self) -> tuple[Tensor, Tensor]:
        """ids [N, max_length] int64 and the log-probability of each [N, max_length] fp32, in tensors of their own"""
        return self.ids.clone(), self.log_probs.clone()
