"""Decoding: greedy and beams, with and without cache, in buckets and compiled, against plain loops over all words."""

import itertools

import pytest
import torch
import worlds
from torch.nn import functional as F

from fastidc.errors import FastidcError
from fastidc.generate import decode, plan
from fastidc.generate.beams import Beams
from fastidc.generate.greedy import Greedy
from fastidc.generate.step import Decoder, next_words
from fastidc.generate.words import top_words
from fastidc.model.clip4idc import CLIP4IDC

CONFIG = worlds.SMALL
LENGTH = 12


def model_of(vocabulary: int = CONFIG.vocab_size, seed: int = 0, ends: float = 0.0, layers: int = 2) -> CLIP4IDC:
    """fp64, so that no rounding decides between words. ``ends`` is added to the end token's logit."""
    torch.manual_seed(seed)
    model = CLIP4IDC(CONFIG.replace(vocab_size=vocabulary, captioner_layers=layers)).double().eval()
    with torch.no_grad():
        for p in model.captioner.parameters():
            p.mul_(3)  # a random start says nearly the same of every pair
        model.text_encoder.token_embedding.mul_(20)
        model.text_encoder.position.mul_(100)  # or it says the same word again and again
        model.captioner.head_bias[model.config.end_id] += ends
    return model


def decoder_of(model: CLIP4IDC) -> Decoder:
    text = model.text_encoder
    return Decoder(model.captioner, text.token_embedding, text.position, model.config.start_id, model.config.end_id)


def tokens_of(pairs: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(pairs, 7, CONFIG.embed_dim, generator=g, dtype=torch.float64)


@torch.no_grad()
def log_probs_of(model, tokens, ids):
    """tokens [1, M, E], ids [N, T] of one pair -> [N, T] log-probabilities of each id after those before, without a cache."""
    captioner, text = model.captioner, model.text_encoder
    given = F.pad(ids, (1, 0), value=model.config.start_id)[:, :-1]
    x = captioner.decode(given, captioner.encode(tokens), text.token_embedding, text.position)
    return F.linear(x, text.token_embedding, captioner.head_bias).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@torch.no_grad()
def uncached_greedy(model, tokens, steps):
    captioner, text = model.captioner, model.text_encoder
    ids = torch.full((len(tokens), 1), model.config.start_id)
    for _ in range(steps):
        x = captioner.decode(ids, captioner.encode(tokens), text.token_embedding, text.position)[:, -1]
        ids = torch.cat([ids, F.linear(x, text.token_embedding, captioner.head_bias).argmax(-1, keepdim=True)], dim=1)
    return ids[:, 1:]


def cut(ids, end):
    """Raw rows -> zero after the first end token"""
    after = (ids == end).cumsum(1) - (ids == end).long()
    return ids.masked_fill(after > 0, 0)


def test_raw_steps_are_those_without_a_cache():
    model, tokens = model_of(), tokens_of(9)
    ids, log_probs = model.generate_from_tokens(tokens, LENGTH, stop_early=False)
    assert torch.equal(ids, uncached_greedy(model, tokens, LENGTH))
    assert len(ids.unique()) > 15, "few words would show little"
    for i in range(len(tokens)):
        torch.testing.assert_close(log_probs[i], log_probs_of(model, tokens[i : i + 1], ids[i : i + 1])[0].float())


def test_ended_rows_are_zero_and_the_others_go_on():
    model = model_of(ends=11.0)
    tokens = tokens_of(40)
    raw = uncached_greedy(model, tokens, LENGTH)
    ids, log_probs = model.generate_from_tokens(tokens, LENGTH)
    lengths = (ids != 0).sum(1)
    assert torch.equal(ids, cut(raw, model.config.end_id))
    assert len(lengths.unique()) > 3
    assert (log_probs[ids == 0] == 0).all()
    assert (log_probs <= 0).all()
    assert log_probs.min() < -0.5


@pytest.mark.parametrize("ends", [0.0, 11.0])
@pytest.mark.parametrize("beams", [1, 3])
def test_buckets_change_nothing(beams, ends):
    """Batches of 1 to 65 in a bucket, right across their borders, each pair as eager decoding of it by itself."""
    model, length = model_of(ends=ends), 9
    tokens, some = tokens_of(65), [0, 1, 2, 3, 4, 31, 62, 63, 64]
    alone = {i: model.generate_from_tokens(tokens[i : i + 1], length, beams, graphs=False) for i in some}
    for size in (1, 3, 4, 5, 64, 65):
        for graphs in (False, True):
            ids, log_probs = model.generate_from_tokens(tokens[:size], length, beams, graphs=graphs)
            assert ids.shape == log_probs.shape == (size, length)
            for i in some:
                if i < size:
                    assert torch.equal(ids[i : i + 1], alone[i][0]), f"pair {i} of {size}, graphs={graphs}"
                    torch.testing.assert_close(log_probs[i : i + 1], alone[i][1])


def test_bucket_sizes():
    sizes = [plan.bucket(n) for n in range(1, 300)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert [plan.bucket(n) for n in (1, 2, 3, 5, 33, 64, 65, 129)] == [1, 2, 4, 8, 64, 64, 128, 192]


def test_a_plan_serves_one_batch_after_another():
    """Shorter batches after longer ones, weights changed in place between them, and it stops one part after the last caption's end."""
    model = model_of(ends=11.0)
    decoder = decoder_of(model)
    for search in (plan_search(1), plan_search(3)):
        with torch.no_grad():
            served = plan.Plan(search, decoder, tokens_of(1), 8, next_words)
            for pairs, seed in ((8, 1), (3, 2), (1, 3), (8, 4)):
                model.captioner.head_bias[model.config.end_id] += 0.1
                tokens = tokens_of(pairs, seed)
                expected = model.generate_from_tokens(tokens, LENGTH, getattr(search, "beams", 1))
                for found, want in zip(served(tokens), expected, strict=True):
                    torch.testing.assert_close(found, want)
            model.captioner.head_bias[model.config.end_id] += 100.0
            steps = []
            step = search.step
            search.step = lambda *args, steps=steps, step=step: (steps.append(args[1]), step(*args))
            served(tokens_of(4))
            assert steps == list(range(LENGTH))[: 2 * plan.STEPS], "ended in the first part, known after the second"
            model.captioner.head_bias[model.config.end_id] -= 100.4


def plan_search(beams: int):
    return Greedy(LENGTH, stop_early=True) if beams == 1 else Beams(LENGTH, beams, 0.0)


# ---- words


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("count", [1, 4])
def test_the_vocabulary_in_pieces(rows, count, monkeypatch):
    g = torch.Generator().manual_seed(2)
    x, words, bias = torch.randn(rows, 16, generator=g), torch.randn(9001, 16, generator=g), torch.randn(9001, generator=g)
    expected = F.linear(x, words, bias).log_softmax(-1).topk(count)
    for budget in (2**30, 1):  # all at once, and pieces of 4096
        monkeypatch.setitem(top_words.__globals__["_AT_A_TIME"], "cpu", budget)
        log_probs, ids = top_words(x, words, bias, count)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(log_probs, expected.values, atol=1e-5, rtol=1e-5)


def test_of_equal_words_the_first_is_chosen(monkeypatch):
    words = torch.randn(9001, 4)
    words[[3, 5000, 9000]] = 50.0
    for budget in (2**30, 1):
        monkeypatch.setitem(top_words.__globals__["_AT_A_TIME"], "cpu", budget)
        log_probs, ids = top_words(torch.ones(6, 4), words, torch.zeros(9001), 1)
        assert ids[:, 0].tolist() == [3] * 6
        torch.testing.assert_close(log_probs, torch.full((6, 1), 1 / 3).log())


# ---- beams


def candidates(vocabulary: int, length: int, end: int):
    """Every caption: ended within ``length`` words, or ``length`` words without an end."""
    words = [w for w in range(vocabulary) if w != end]
    for n in range(length):
        yield from ((*row, end) for row in itertools.product(words, repeat=n))
    yield from itertools.product(words, repeat=length)


def best_of_all(model, tokens, length, penalty):
    """The exhaustive oracle: [(ids, score)] of each pair, and the runner-up's score."""
    rows = list(candidates(model.config.vocab_size, length, model.config.end_id))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(length) < lengths[:, None]
    out = []
    for row in tokens:
        scores = (log_probs_of(model, row[None], ids) * real).sum(1) / lengths**penalty
        out.append((ids[scores.argmax()].tolist(), float(scores.max())))
    return out


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
@pytest.mark.parametrize(("vocabulary", "length"), [(6, 2), (4, 4), (3, 5)])
def test_enough_beams_are_exhaustive(vocabulary, length, penalty):
    tokens = tokens_of(6)
    found_words = set()
    for ends in (-2.0, 2.0, 12.0, 40.0):
        model = model_of(vocabulary, ends=ends)
        decoder = decoder_of(model)
        ids, log_probs = decode(decoder, tokens, length, beams=vocabulary ** (length - 1), length_penalty=penalty)
        for row, scores, (expected, score) in zip(ids.tolist(), log_probs, best_of_all(model, tokens, length, penalty), strict=True):
            assert row == expected
            words = row.index(model.config.end_id) + 1 if model.config.end_id in row else length
            assert float(scores.sum()) / words**penalty == pytest.approx(score, abs=1e-5)
            found_words.add(words)
    assert len(found_words) > 1


def plain_beams(model, tokens, length, beams, penalty):
    """Beam search of one pair in lists: candidates of every running beam, the best 2k of them, ends kept apart, the rest cut to k."""
    end, running, ended = model.config.end_id, [((), 0.0)], []
    for position in range(length):
        ids = torch.tensor([[*row, w] for row, _ in running for w in range(model.config.vocab_size)])
        last = log_probs_of(model, tokens, ids)[:, -1].tolist()
        sums = [score for _, score in running for _ in range(model.config.vocab_size)]
        found = sorted(zip(map(tuple, ids.tolist()), map(sum, zip(sums, last)), strict=True), key=lambda c: -c[1])[: 2 * beams]
        ended += [(row, score / (position + 1) ** penalty) for row, score in found if row[-1] == end]
        running = [c for c in found if c[0][-1] != end][:beams]
        if ended and max(score for _, score in ended) >= running[0][1] / length**penalty:
            return max(ended, key=lambda c: c[1])[0]
    return max(ended + [(row, score / length**penalty) for row, score in running], key=lambda c: c[1])[0]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_the_plain_ones(beams, penalty):
    model, tokens = model_of(40, ends=5.0), tokens_of(8)
    ids, log_probs = model.generate_from_tokens(tokens, LENGTH, beams, length_penalty=penalty)
    for i, row in enumerate(ids.tolist()):
        expected = plain_beams(model, tokens[i : i + 1], LENGTH, beams, penalty)
        assert row == [*expected, *[0] * (LENGTH - len(expected))]
        exact = log_probs_of(model, tokens[i : i + 1], torch.tensor([expected]))[0]
        torch.testing.assert_close(log_probs[i, : len(expected)], exact.float())
    greedy = model.generate_from_tokens(tokens, LENGTH)
    assert not torch.equal(greedy[0], ids), "beams that find nothing else would show little"
    if not penalty:
        assert (log_probs.sum(1) >= greedy[1].sum(1) - 1e-6).float().mean() > 0.8


def test_one_beam_is_greedy():
    """The search itself with one beam, which `decode` would never ask: another way to the same words where nothing runs beside them."""
    model, tokens = model_of(), tokens_of(5)
    decoder = decoder_of(model)
    search = Beams(LENGTH, 1, 0.0)
    with torch.no_grad():
        model.captioner.head_bias[model.config.end_id] = -1e3
        search.start(decoder, tokens, torch.tensor([5]))
        for position in range(LENGTH):
            search.step(decoder, position, next_words)
    for found, expected in zip(search.result(), model.generate_from_tokens(tokens, LENGTH, beams=1), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_caption_s_length_counts_its_end():
    """Sums -1.0 of one word and -1.8 of two: with penalty 1 the longer one wins by -0.9 a word, then -3.0 of three does not."""
    search = Beams(4, 1, 1.0)
    search.start(decoder_of(model_of()), tokens_of(1), torch.ones(1, dtype=torch.long))
    none = torch.zeros(1, 1, dtype=torch.long)
    for position, total, best in ((0, -1.0, -1.0), (1, -1.8, -0.9), (2, -3.0, -0.9)):
        word = torch.full((1, 1), position + 5)
        search._keep_best(position, torch.tensor([[total]]), none, word, torch.zeros(1, 1))
        assert float(search.best) == pytest.approx(best)
    assert search.best_ids[0].tolist() == [0, 6, 0, 0]


@pytest.mark.parametrize("search", [Greedy(4, True), Beams(4, 2, 0.0)], ids=["greedy", "beams"])
def test_rows_that_fill_a_bucket_up_do_not_keep_it_going(search):
    search.start(decoder_of(model_of()), tokens_of(3), torch.tensor([1]))
    running = ~search.ended if isinstance(search, Greedy) else search.sums.isfinite().any(1)
    assert running.tolist() == [True, False, False]
    assert not search.done
    search.start(decoder_of(model_of()), tokens_of(3), torch.tensor([0]))
    assert search.done


def test_modules_are_left_as_they_were():
    model = model_of()
    model.captioner.train()
    model.generate(*torch.zeros(2, 1, 3, 48, 48, dtype=torch.float64), max_length=2)
    assert model.captioner.dropout.training
    assert not model.training
    assert not model.text_encoder.training


def test_the_pad_id_is_a_word():
    """Id 0 is "!": greedy and beams say it where it is likeliest, and go on after it."""
    model = model_of()
    with torch.no_grad():
        model.captioner.head_bias[0] = 1e3
    tokens = tokens_of(2)
    for beams in (1, 2):
        ids, log_probs = model.generate_from_tokens(tokens, 6, beams)
        assert (ids == 0).all()
        assert log_probs.sum(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


# ---- compiled


@pytest.mark.parametrize("beams", [1, 2])
def test_compiled_decoding_is_the_same_and_compiles_once_a_bucket(beams):
    model, tokens = model_of(ends=5.0, layers=1), tokens_of(4)
    torch._dynamo.reset()
    expected = model.generate_from_tokens(tokens, LENGTH, beams, graphs=False)
    found = model.generate_from_tokens(tokens, LENGTH, beams, compiled=True)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pairs, seed in ((4, 5), (3, 6)):  # another batch, and another size of the same bucket
            tokens = tokens_of(pairs, seed)
            ids = model.generate_from_tokens(tokens, LENGTH, beams, compiled=True)[0]
            assert torch.equal(ids, model.generate_from_tokens(tokens, LENGTH, beams, graphs=False)[0])


# ---- sentences


def test_sentences():
    model, images = model_of(), torch.zeros(2, 2, 3, 48, 48, dtype=torch.float64)
    for wanted, sentence in (
        ({"max_length": 25}, "max_length 25 exceeds the model's 24 positions; ask for fewer words"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"beams": 0}, "beams must be at least 1, which is greedy decoding; got 0"),
        ({"beams": 121}, "beams 121 exceeds the vocabulary of 120 words"),
        ({"beams": 2, "stop_early": False}, "stop_early=False .* no meaning with beams > 1"),
        ({"length_penalty": -1.0, "beams": 2}, "length_penalty must lie in 0 to 10, got -1.0"),
        ({"length_penalty": 30.0, "beams": 2}, "length_penalty must lie in 0 to 10, got 30.0"),
        ({"length_penalty": 1.0}, "length_penalty 1.0 chooses among beams, and there is one"),
    ):
        with pytest.raises(FastidcError, match=sentence):
            model.generate(*images.unbind(1), **{"max_length": 8, **wanted})
    with pytest.raises(FastidcError, match="the batch is empty"):
        model.generate(*images[:0].unbind(1), max_length=8)
    model.train()
    with pytest.raises(FastidcError, match="beams must be"):
        model.generate(*images.unbind(1), max_length=8, beams=-1)
    assert model.training
    assert model.generate(*images.unbind(1), max_length=8, beams=2).shape == (2, 8)
