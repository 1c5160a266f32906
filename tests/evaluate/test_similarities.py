import numpy as np
import pytest

from fastidc.errors import FastidcError
from fastidc.evaluate.intervals import draws, retrieval_intervals
from fastidc.evaluate.retrieval import retrieval_metrics, retrieval_ranks
from fastidc.evaluate.similarities import read_similarity, score_similarity, table


def world(seed=0, pairs=30):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(pairs), rng.integers(0, pairs, 2 * pairs)])
    similarity = rng.normal(size=(3 * pairs, pairs)).round(1)  # ties
    similarity[np.arange(3 * pairs), owner] += 1.5
    return similarity, owner


def test_files_of_both_kinds_are_read(tmp_path):
    similarity, owner = world()
    np.savez(tmp_path / "s.npz", similarity=similarity, text_to_pair=owner)
    found = read_similarity(tmp_path / "s.npz")
    assert (found[0] == similarity).all()
    assert (found[1] == owner).all()
    np.save(tmp_path / "s.npy", similarity[:30])
    assert read_similarity(tmp_path / "s.npy")[1].tolist() == list(range(30))


def test_bad_files_are_named(tmp_path):
    def saved(name, save):
        save(tmp_path / name)
        return tmp_path / name

    cases = [
        (tmp_path / "none.npy", "cannot be read"),
        (saved("text.npy", lambda path: path.write_text("hello")), "no .npy or .npz"),
        (saved("cut.npz", lambda path: path.write_bytes(b"PK\x03\x04rest")), "no .npy or .npz"),
        (saved("long.npy", lambda path: np.save(path, np.ones((3, 2)))), "3 sentences for 2 pairs"),
        (saved("flat.npy", lambda path: np.save(path, np.ones(3))), r"float64 \[3\]"),
        (saved("other.npz", lambda path: np.savez(path, sim=np.ones((2, 2)))), "has sim and no `similarity`"),
        (saved("code.npy", lambda path: np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)), "no .npy or .npz"),
    ]
    for path, message in cases:
        with pytest.raises(FastidcError, match=message) as caught:
            read_similarity(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("ties", ["strict", "legacy"])
def test_intervals_are_those_of_the_drawn_pairs(ties):
    """Every resample by hand: the ranks of each drawn pair, as often as it was drawn."""
    similarity, owner = world()
    ranks = retrieval_ranks(similarity, owner, ties)
    found = retrieval_intervals(ranks, 30, (1, 5), resamples=40, seed=2)
    for direction, (values, pair) in ranks.items():
        resampled = [
            np.concatenate([values[pair == one] for one in range(30) for _ in range(int(row[one]))]) for row in next(draws(30, 40, 2))
        ]
        expected = {
            "R@1": [100 * np.mean(some <= 1) for some in resampled],
            "R@5": [100 * np.mean(some <= 5) for some in resampled],
            "MdR": [np.sort(some)[(len(some) - 1) // 2] for some in resampled],
            "MnR": [np.mean(some) for some in resampled],
        }
        for name, all_values in expected.items():
            assert found[direction][name] == pytest.approx(np.quantile(all_values, [0.025, 0.975]).tolist(), abs=1e-9), (direction, name)


def test_scores_are_the_metrics_and_lie_in_their_intervals():
    similarity, owner = world(1)
    scores = score_similarity(similarity, owner)
    for ties in ("strict", "legacy"):
        plain = retrieval_metrics(similarity, owner, ties=ties, ks=(1, 5, 10, 20, 50))
        for direction in ("text_to_pair", "pair_to_text"):
            intervals = scores[ties][direction].pop("intervals")
            assert scores[ties][direction] == plain[direction]
            assert intervals["R@1"][0] < plain[direction]["R@1"] < intervals["R@1"][1]
    text = table(scores)
    assert text.count("strict") == text.count("legacy") == 2
    assert max(map(len, text.splitlines())) <= 120
    assert "intervals" not in score_similarity(similarity, owner, resamples=0)["strict"]["text_to_pair"]
