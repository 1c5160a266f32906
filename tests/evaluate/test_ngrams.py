"""Our array operations against pycocoevalcap's loops: corpus and every caption, to 1e-9."""

import random

import numpy as np
import pytest
from evaluate_oracle import our_scores, python_scores

from fastidc.evaluate.intervals import bootstrap, caption_intervals, draws
from fastidc.evaluate.ngrams import Ngrams, bleu_of
from fastidc.evaluate.ptb import ptb_regex


def close(ours, theirs):
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-9)


def sentences(seed, pairs, words=12, longest=9):
    draw = random.Random(seed)
    vocabulary = ["a", "the", "cube", "ball", "moved", "left", "of", "1\u00a01/2", "gone", "is", "red", "blue"][:words]
    sentence = lambda: " ".join(draw.choices(vocabulary, k=draw.choice([0, *range(longest + 1)])))  # noqa: E731
    references = [[sentence() for _ in range(draw.randint(1, 6))] for _ in range(pairs)]
    captions = [draw.choice([sentence(), texts[0]]) for texts in references]
    references[0] = ["the cube moved"]  # a corpus without a word is pycocoevalcap's ValueError
    return references, captions


@pytest.mark.parametrize(("seed", "pairs", "words"), [(0, 1, 12), (1, 2, 12), (2, 40, 3), (3, 400, 12), (4, 300, 1)])
def test_random_sentences_score_as_pycocoevalcap_scores_them(seed, pairs, words):
    references, captions = sentences(seed, pairs, words)
    close(our_scores(Ngrams(references, captions)), python_scores(references, captions))


def test_a_subset_has_its_own_document_frequencies():
    references, captions = sentences(5, 60)
    chosen = np.array([0, *range(3, 60, 4)])
    ngrams = Ngrams(references, captions)
    some = [references[i] for i in chosen], [captions[i] for i in chosen]
    close(our_scores(ngrams, chosen), python_scores(*some))
    assert abs(ngrams.cider(chosen) - ngrams.cider()[chosen]).max() > 1e-3


def test_without_a_word_everything_but_rouge_is_nothing():
    ngrams = Ngrams([[""], ["", ""]], ["", "x"])
    assert ngrams.cider().tolist() == [0.0, 0.0]
    assert ngrams.rouge.tolist() == [1.0, 0.0]  # of an empty caption and an empty reference, as pycocoevalcap has it


def test_a_resample_is_bleu_of_the_drawn_pairs():
    """The statistics of drawn pairs, added up, are pycocoevalcap's BLEU of a corpus that holds each as often as it was drawn."""
    references, captions = sentences(6, 30)
    ngrams = Ngrams(references, captions)
    values = bootstrap(ngrams.bleu, bleu_of, 3, seed=7)
    for row, times in zip(values, next(draws(30, 3, 7)).astype(int), strict=True):
        drawn = np.repeat(np.arange(30), times)
        assert len(drawn) == 30
        expected, _ = python_scores([references[i] for i in drawn], [captions[i] for i in drawn])
        np.testing.assert_allclose(row, expected[:4], rtol=0, atol=1e-9)


def test_intervals_are_those_of_the_mean_and_the_same_for_a_seed():
    rng = np.random.default_rng(0)
    scores = rng.random(900)
    bleu = np.ones((900, 10))
    found = caption_intervals(bleu, scores, 2 * scores, seed=3)
    half = 1.96 * scores.std() / 30
    np.testing.assert_allclose(found["ROUGE-L"], [scores.mean() - half, scores.mean() + half], rtol=0, atol=0.2 * half)
    np.testing.assert_allclose(found["CIDEr"], 2 * np.array(found["ROUGE-L"]), rtol=0, atol=1e-12)
    assert found["METEOR"] is None
    assert found == caption_intervals(bleu, scores, 2 * scores, seed=3)
    assert found["CIDEr"] != caption_intervals(bleu, scores, 2 * scores, seed=4)["CIDEr"]


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch):
    whole = np.concatenate(list(draws(50, 20, 1)))
    monkeypatch.setattr("fastidc.evaluate.intervals._AT_ONCE", 150)
    parts = list(draws(50, 20, 1))
    assert len(parts) == 7
    assert (np.concatenate(parts) == whole).all()
    assert (whole.sum(axis=1) == 50).all()


@pytest.mark.slow
def test_real_sentences_and_a_hundred_thousand_more(real_sentences, grammar):
    tokens = [ptb_regex(sentence) for sentence in real_sentences]
    references = [tokens[i : i + 4] for i in range(0, len(tokens), 4)]
    captions = [tokens[(7 * i) % len(tokens)] if i % 2 else texts[0] for i, texts in enumerate(references)]
    close(our_scores(Ngrams(references, captions)), python_scores(references, captions))
    made = [grammar.change(kind) for _ in range(20_000) for kind in grammar.types]
    references = [made[i : i + 5] for i in range(0, len(made), 5)]
    captions = [made[(11 * i) % len(made)] for i in range(len(references))]
    close(our_scores(Ngrams(references, captions)), python_scores(references, captions))
