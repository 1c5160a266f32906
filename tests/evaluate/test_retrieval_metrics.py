import numpy as np
import pytest
import torch

from fastidc.errors import FastidcError
from fastidc.evaluate import retrieval
from fastidc.evaluate.retrieval import rank, retrieval_metrics, unique_sentences

OFFICIAL_EXAMPLE = np.array([[1.0, 2, 3], [5, 5, 4], [0, 1, 7]])


def brute_rank(row, true, ties):
    greater = sum(value > row[true] for value in row)
    equal = sum(value == row[true] for value in row) - 1
    return 1 + greater + {"strict": equal, "mean": equal / 2, "optimistic": 0}[ties]


def brute_metrics(similarity, owner, ties):
    texts, pairs = similarity.shape
    forth = [brute_rank(similarity[text], owner[text], ties) for text in range(texts)]
    groups = [
        [max(similarity[text, pair] for text in range(texts) if owner[text] == group) for group in range(pairs)] for pair in range(pairs)
    ]
    back = [brute_rank(groups[pair], pair, ties) for pair in range(pairs)]

    def summary(ranks):
        return {
            **{f"R@{k}": 100 * sum(value <= k for value in ranks) / len(ranks) for k in (1, 5, 10)},
            "MdR": sorted(ranks)[(len(ranks) - 1) // 2],
            "MnR": sum(ranks) / len(ranks),
            "queries": len(ranks),
        }

    return {"text_to_pair": summary(forth), "pair_to_text": summary(back), "ties": ties}


def official(similarity, owner):
    """Both directions as the official script computes them (clip4idc.md 7.1), ranks from 1."""
    pairs = similarity.shape[1]
    groups = [similarity[owner == pair] for pair in range(pairs)]
    longest = max(map(len, groups))
    padded = np.stack([np.concatenate([group, np.full((longest - len(group), pairs), -np.inf)]) for group in groups])  # [P, L, P]
    stacked = torch.tensor(padded).permute(1, 0, 2)
    places = torch.argsort(torch.argsort(stacked, dim=-1, descending=True), dim=-1)
    own = torch.diagonal(torch.tensor(padded), dim1=0, dim2=2).flatten()
    forth = places.diagonal(dim1=1, dim2=2).flatten()[~torch.isinf(own)]
    x = padded.max(axis=1).T
    ordered = np.sort(-x, axis=1)
    back = np.where(ordered - np.diag(-x)[:, None] == 0)[1]
    return forth.numpy() + 1, back + 1


def random_case(seed, levels=None, texts=60, pairs=17):
    draw = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(pairs), draw.integers(0, pairs, texts - pairs)])
    draw.shuffle(owner)
    similarity = draw.standard_normal((texts, pairs)) if levels is None else draw.integers(0, levels, (texts, pairs)).astype(np.float64)
    return similarity, owner


@pytest.mark.parametrize("ties", ["strict", "mean", "optimistic"])
@pytest.mark.parametrize("levels", [None, 1, 2, 6])
def test_metrics_are_those_of_a_plain_loop(ties, levels, monkeypatch):
    similarity, owner = random_case(5, levels)
    expected = brute_metrics(similarity, owner, ties)
    assert retrieval_metrics(similarity, owner, ties=ties) == expected
    monkeypatch.setattr(retrieval, "_CHUNK", 40)  # several chunks of rows, and of columns
    assert retrieval_metrics(similarity, owner, ties=ties) == expected


@pytest.mark.parametrize("levels", [None, 1, 2, 6])
@pytest.mark.parametrize("seed", range(3))
def test_legacy_is_the_official_code(levels, seed):
    similarity, owner = random_case(seed, levels)
    forth, back = official(similarity, owner)
    result = retrieval_metrics(similarity, owner, ties="legacy")
    assert result["text_to_pair"]["R@1"] == pytest.approx(100 * np.mean(forth <= 1))
    assert result["text_to_pair"]["R@5"] == pytest.approx(100 * np.mean(forth <= 5))
    assert result["text_to_pair"]["MdR"] == float(torch.median(torch.from_numpy(forth)))
    assert result["text_to_pair"]["MnR"] == pytest.approx(forth.mean())
    assert result["pair_to_text"]["R@1"] == pytest.approx(100 * np.mean(back <= 1))
    assert result["pair_to_text"]["MdR"] == np.median(back)
    assert result["pair_to_text"]["MnR"] == pytest.approx(back.mean())
    assert result["pair_to_text"]["queries"] == len(back)


def test_the_official_example():
    # pair -> text of one sentence a pair: the matrix is read as [pair, group], so the similarity is its transpose.
    result = retrieval_metrics(OFFICIAL_EXAMPLE.T, [0, 1, 2], ties="legacy")["pair_to_text"]
    assert retrieval._legacy_pair_ranks(OFFICIAL_EXAMPLE)[0].tolist() == [3, 1, 2, 1]
    assert (result["R@1"], result["queries"]) == (50.0, 4)
    strict = retrieval_metrics(OFFICIAL_EXAMPLE.T, [0, 1, 2])["pair_to_text"]
    assert strict["R@1"] == pytest.approx(100 / 3)
    assert strict["queries"] == 3


def test_no_tie_raises_a_strict_metric():
    same = np.zeros((20, 20))
    strict = retrieval_metrics(same, np.arange(20))
    assert (
        strict["text_to_pair"] == strict["pair_to_text"] == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "MdR": 20.0, "MnR": 20.0, "queries": 20}
    )
    assert retrieval_metrics(same, np.arange(20), ties="optimistic")["pair_to_text"]["R@1"] == 100.0
    assert retrieval_metrics(same, np.arange(20), ties="mean")["pair_to_text"]["MnR"] == 10.5


def test_every_tie_rule_agrees_where_there_is_no_tie():
    similarity, owner = random_case(9)
    results = [retrieval_metrics(similarity, owner, ties=ties) for ties in ("strict", "mean", "optimistic")]
    assert results[0]["text_to_pair"] == results[1]["text_to_pair"] == results[2]["text_to_pair"]
    legacy = retrieval_metrics(similarity, owner, ties="legacy")
    assert legacy["text_to_pair"] == results[0]["text_to_pair"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_taken(dtype):
    similarity, owner = random_case(2, 6)
    tensor = torch.from_numpy(similarity).to(dtype).requires_grad_()
    assert retrieval_metrics(tensor, torch.from_numpy(owner)) == retrieval_metrics(similarity, owner)


def test_other_cut_offs():
    similarity, owner = random_case(4)
    assert [key for key in retrieval_metrics(similarity, owner, ks=(10, 20, 50))["text_to_pair"] if key.startswith("R@")] == [
        "R@10",
        "R@20",
        "R@50",
    ]


def test_rank_and_unique_sentences():
    assert rank(OFFICIAL_EXAMPLE, [0, 1, 2]).tolist() == [3, 2, 1]
    assert rank(OFFICIAL_EXAMPLE, [0, 1, 2], "mean").tolist() == [3, 1.5, 1]
    assert rank(OFFICIAL_EXAMPLE, [0, 1, 2], "optimistic").tolist() == [3, 1, 1]
    sentences, inverse = unique_sentences(["b", "a", "b"])
    assert (sentences, inverse.tolist()) == (["b", "a"], [0, 1, 0])


@pytest.mark.parametrize(
    ("similarity", "owner", "message"),
    [
        (np.zeros((2, 2)), [0, 2], r"text_to_pair\[1\] is 2"),
        (np.zeros((2, 2)), [0, -1], r"text_to_pair\[1\] is -1"),
        (np.zeros((3, 2)), [0, 1], "2 entries for 3 sentences"),
        (np.zeros((2, 2)), [0, 0], "pair 1 has no sentence"),
        (np.zeros((2, 2)), [0.0, 1.0], "not a list of whole numbers"),
        (np.zeros(2), [0, 1], "1 dimensions"),
        (np.array([[0, 1], [np.nan, 0]]), [0, 1], r"similarity\[1, 0\] is nan"),
        (np.array([[0, 1], [0, np.inf]]), [0, 1], r"similarity\[1, 1\] is inf"),
        (np.zeros((0, 0)), [], "nothing to rank"),
    ],
)
def test_bad_input_is_named(similarity, owner, message):
    with pytest.raises(FastidcError, match=message):
        retrieval_metrics(similarity, owner)


def test_unknown_ties_are_refused():
    with pytest.raises(FastidcError, match="'lucky' is not one of strict, mean, optimistic, legacy"):
        retrieval_metrics(np.eye(2), [0, 1], ties="lucky")
    with pytest.raises(FastidcError, match="'legacy' of a rank"):
        rank(np.eye(2), [0, 1], ties="legacy")
