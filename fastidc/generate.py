"""Greedy decoding with a static cache."""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def greedy(
    captioner, tokens: Tensor, words: Tensor, positions: Tensor, *, start_id: int, end_id: int, max_length: int, stop_early: bool
) -> tuple[Tensor, Tensor]:
    """The most likely word at every step.

    captioner: a `fastidc.model.captioner.Captioner` in evaluation mode; tokens [B, M, E] of the pairs; words [V, E]; positions [P, E],
    ``max_length`` <= P. The encoder and every cross-attention key and value are computed once, keys and values of earlier words are
    kept. Returns ids [B, max_length] int64 without the start token and the log-probability of each chosen id [B, max_length].
    With ``stop_early`` ids and log-probabilities are zero after the end token and decoding ends when every row has ended; without, it
    is the official evaluation's fixed number of raw steps.
    """
    batch, device = len(tokens), tokens.device
    memory = [layer.cross.kv(encoded) for layer, encoded in zip(captioner.decoder, captioner.encode(tokens), strict=True)]
    caches = [kv.new_zeros(batch, max_length, kv.shape[-1]) for kv in memory]
    ids = torch.zeros(batch, max_length, dtype=torch.long, device=device)
    log_probs = torch.zeros(batch, max_length, device=device)
    last = torch.full((batch, 1), start_id, dtype=torch.long, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    for position in range(max_length):
        x = captioner.embed(last, words, positions[position : position + 1])
        for layer, cache, kv in zip(captioner.decoder, caches, memory, strict=True):
            x = layer.step(x, cache, position, kv)
        logits = F.linear(captioner.transform(x[:, 0]), words, captioner.head_bias).float()
        top, chosen = logits.max(dim=-1)
        log_prob = top - logits.logsumexp(dim=-1)
        if stop_early:
            chosen, log_prob = chosen.masked_fill(ended, 0), log_prob.masked_fill(ended, 0)
            ended = ended | (chosen == end_id)
        ids[:, position], log_probs[:, position] = chosen, log_prob
        last = chosen[:, None]
        # asking a GPU costs a wait, so it is asked now and then only
        if stop_early and (device.type == "cpu" or position % 8 == 7) and bool(ended.all()):
            break
    return ids, log_probs
