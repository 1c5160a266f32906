"""Vectors of pairs and sentences, their order, and the file that keeps them."""

import numpy as np
import pytest
import torch
import worlds
from torch.nn import functional as F

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import CAPTIONS, MAX_WORDS, image_pairs, run_folder

from fastidc import CLIP4IDC, FastidcError, PairRecord, Tokenizer, embed_pairs, embed_texts, rank
from fastidc.data.images import ImageStore
from fastidc.describe.index import Entry, Index, fingerprint, stamps
from fastidc.describe.loading import load
from fastidc.describe.search import embed_query
from fastidc.evaluate import predict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"), captioner=False)


@pytest.fixture(scope="module")
def ready(run):
    return load(run, "cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return image_pairs(tmp_path_factory.mktemp("pairs"), 5)


def test_pairs_and_sentences_are_those_of_evaluation(run, ready, pairs):
    model = CLIP4IDC.from_pretrained(run).eval()
    records = [PairRecord(str(i), *pair, ()) for i, pair in enumerate(pairs)]
    expected = F.normalize(predict.embed_pairs(model, records, ImageStore(48)), dim=-1)
    for found in (embed_pairs(ready, pairs, batch_size=2), embed_pairs(run, pairs)):
        assert torch.allclose(found, expected, atol=1e-5)
    text = F.normalize(predict.embed_sentences(model, Tokenizer.of(model.config), CAPTIONS, max_words=MAX_WORDS), dim=-1)
    assert torch.allclose(embed_texts(ready, CAPTIONS, batch_size=4), text, atol=1e-5)
    similarity = model.similarity(text, expected).argsort(dim=1, descending=True)
    for sentence, order in zip(text, similarity, strict=True):
        assert [i for i, _ in rank(sentence, expected)] == order.tolist()


def test_equal_sentences_tie_and_keep_their_order(ready):
    sentences = ["the blue cube has been added", "nothing has changed", "the green ball is gone", "nothing has changed"]
    found = embed_texts(ready, sentences, batch_size=2)
    assert torch.equal(found[1], found[3])
    assert [i for i, _ in rank(found[1], found)][:2] == [1, 3]
    assert embed_texts(ready, []).shape == (0, 64)
    assert embed_pairs(ready, []).shape == (0, 64)


def test_rank_is_the_cosine_whatever_the_lengths():
    rng = np.random.default_rng(0)
    candidates = rng.standard_normal((50, 33)).astype(np.float32)
    candidates[[3, 20, 49]] = candidates[7]
    query = candidates[7] + 0.01 * candidates[1]
    found = rank(torch.from_numpy(5 * query), candidates * rng.uniform(0.5, 2, (50, 1)).astype(np.float32))
    cosine = candidates @ query / np.linalg.norm(candidates, axis=1) / np.linalg.norm(query)
    assert len(found) == 50
    assert [score for _, score in found] == pytest.approx(sorted(cosine, reverse=True), abs=1e-5)
    assert [i for i, _ in rank(query, candidates, top=4)] == [3, 7, 20, 49], "of equals the earlier one first"
    assert rank(query, candidates[:0]) == []


@pytest.mark.parametrize(
    ("query", "candidates", "top", "sentence"),
    [
        (np.ones(3), np.ones((2, 4)), None, r"\[3\] and \[2, 4\]"),
        (np.ones((1, 3)), np.ones((2, 3)), None, "expected"),
        (np.zeros(3), np.ones((2, 3)), None, "the query has no direction"),
        (np.ones(3), np.array([[1.0, 1, 1], [1, np.nan, 1]]), None, "candidate 1"),
        (np.ones(3), np.ones((2, 3)), 0, "top"),
    ],
)
def test_what_cannot_be_ranked_is_a_sentence(query, candidates, top, sentence):
    with pytest.raises(FastidcError, match=sentence):
        rank(query, candidates, top)


def test_a_bad_image_has_no_row(ready, pairs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixed = [pairs[0], (tmp_path / "bad.png", pairs[1][1]), pairs[2], (pairs[3][0], tmp_path / "absent.png")]
    left_out = {}
    found = embed_pairs(ready, mixed, batch_size=3, left_out=left_out)
    assert torch.allclose(found, embed_pairs(ready, [pairs[0], pairs[2]]), atol=1e-5)
    assert {number: str(error).split(":")[0] for number, error in left_out.items()} == {
        1: str(tmp_path / "bad.png"),
        3: str(tmp_path / "absent.png"),
    }
    with pytest.raises(FastidcError, match=r"bad\.png"):
        embed_pairs(ready, mixed)


def test_a_query_of_unknown_words_is_a_sentence(ready):
    with pytest.raises(FastidcError, match="'zebra' has no word that"):
        embed_query(ready, "zebra")


def an_index(ready, pairs):
    entries = [Entry(str(i), *map(str, pair)) for i, pair in enumerate(pairs)]
    return Index("pairs", entries, embed_pairs(ready, pairs), fingerprint(ready), stamps([path for pair in pairs for path in pair]))


def test_an_index_comes_back_as_it_was(ready, pairs, tmp_path):
    index = an_index(ready, pairs)
    index.save(tmp_path / "i.npz")
    found = Index.load(tmp_path / "i.npz", "pairs")
    assert torch.equal(found.embeddings, index.embeddings)
    assert (found.entries, found.files, found.model) == (index.entries, index.files, index.model)
    found.check(tmp_path / "i.npz", ready)
    assert [path.name for path in tmp_path.iterdir()] == ["i.npz"]


def test_an_index_of_something_else_is_refused(ready, run, pairs, tmp_path):
    index, path = an_index(ready, pairs), tmp_path / "i.npz"
    index.save(path)
    with pytest.raises(FastidcError, match="holds pairs, and captions"):
        Index.load(path, "captions")
    changed = load(CLIP4IDC.from_pretrained(run))
    with torch.no_grad():
        changed.model.text_encoder.projection[0, 0] += 1e-3
    with pytest.raises(FastidcError, match="another model"):
        index.check(path, changed)
    worlds.noise_image(tmp_path / "x.png", 1)
    own = Index("pairs", index.entries, index.embeddings, index.model, stamps([tmp_path / "x.png"]))
    own.check(path, ready)
    worlds.noise_image(tmp_path / "x.png", 2, (30, 30))
    with pytest.raises(FastidcError, match=r"x\.png has changed"):
        own.check(path, ready)
    (tmp_path / "x.png").unlink()
    with pytest.raises(FastidcError, match=r"x\.png is gone"):
        own.check(path, ready)


def test_a_damaged_index_is_a_sentence(ready, pairs, tmp_path):
    an_index(ready, pairs).save(tmp_path / "i.npz")
    whole = (tmp_path / "i.npz").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(FastidcError, match=r"cut\.npz: not an index"):
            Index.load(tmp_path / "cut.npz", "pairs")
    np.savez(tmp_path / "other.npz", embeddings=np.zeros((2, 3)))
    with pytest.raises(FastidcError, match=r"other\.npz: not an index"):
        Index.load(tmp_path / "other.npz", "pairs")
    np.savez(tmp_path / "code.npz", embeddings=np.array([{"a": 1}], dtype=object), about=np.zeros(3, np.uint8))
    with pytest.raises(FastidcError, match=r"code\.npz: not an index"):  # NumPy would unpickle it
        Index.load(tmp_path / "code.npz", "pairs")
    with pytest.raises(FastidcError, match="no such index"):
        Index.load(tmp_path / "absent.npz", "pairs")
