"""The vocabulary product, reduced to what decoding asks of it."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits that exist at a time: on a CPU those that stay in a core's second cache, elsewhere what 128 rows of CLIP's vocabulary need.
_AT_A_TIME = {"cpu": 2**18}
_ELSEWHERE = 2**23


def top_words(x: Tensor, words: Tensor, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x [R, E], words [V, E], bias [V] -> log-probabilities fp32 and ids int64 of the ``count`` likeliest words of each row, [R, count],
    likeliest first. Of equals the first counts as the likeliest where ``count`` is 1.

    The table is gone through in pieces, so the logits [R, V] need not exist; of each piece the best words and the log of the sum of
    exponentials are kept.
    """
    rows, size = len(x), len(words)
    piece = max(4096, _AT_A_TIME.get(x.device.type, _ELSEWHERE) // max(1, rows))
    tops, ids, sums = [], [], []
    for start in range(0, size, piece):
        logits = _product(x, words[start : start + piece], bias[start : start + piece])
        best, chosen = _best(logits, count)
        tops.append(best.float())
        ids.append(chosen + start if start else chosen)
        sums.append(_log_sum(logits, tops[-1][:, :1], chosen[:, :1]))
    if len(tops) == 1:
        return tops[0] - sums[0], ids[0]
    best, at = _best(torch.cat(tops, dim=1), count)
    return best - torch.cat(sums, dim=1).logsumexp(1, keepdim=True), torch.cat(ids, dim=1).gather(1, at)


def _best(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == 1:
        return x.max(dim=-1, keepdim=True)
    return x.topk(min(count, x.shape[-1]), dim=-1)


def _log_sum(logits: Tensor, best: Tensor, chosen: Tensor) -> Tensor:
    """log sum exp of logits [R, P] in fp32, [R, 1]; ``best`` [R, 1] are the largest, at ``chosen``."""
    if logits.device.type == "cpu":  # the fewest passes
        return best + (logits.float() - best).exp_().sum(-1, keepdim=True).log()
    return best - logits.log_softmax(-1, dtype=torch.float32).gather(1, chosen)  # the fewest kernels


def _product(x: Tensor, words: Tensor, bias: Tensor) -> Tensor:
    # a few rows in fp32 on a CPU: MKL multiplies a tall table by a thin matrix up to 1.7 times faster than the other way round
    if x.device.type == "cpu" and x.dtype == torch.float32 and 4 <= len(x) <= 32:
        return torch.addmm(bias[:, None], words, x.t()).t()
    return F.linear(x, words, bias)
