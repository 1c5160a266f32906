"""pycocoevalcap's own classes as the oracle: its scores of tokenised sentences."""

import numpy as np


def python_scores(references, captions):
    """(corpus values [BLEU-1..4, ROUGE-L, CIDEr], values of each caption [N, 6]) of tokenised references [N][R] and captions [N]."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts, res = dict(enumerate(references)), {number: [caption] for number, caption in enumerate(captions)}
    bleu, bleus = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouges = Rouge().compute_score(gts, res)
    cider, ciders = Cider().compute_score(gts, res)
    return np.array([*bleu, rouge, cider]), np.column_stack([*bleus, rouges, ciders])


def our_scores(ngrams, chosen=None):
    from fastidc.evaluate.ngrams import bleu_of

    chosen = np.arange(ngrams.pairs) if chosen is None else chosen
    cider = ngrams.cider(chosen)
    corpus = np.array([*bleu_of(ngrams.bleu[chosen].sum(axis=0)), ngrams.rouge[chosen].mean(), cider.mean()])
    return corpus, np.column_stack([bleu_of(ngrams.bleu[chosen]), ngrams.rouge[chosen], cider])
