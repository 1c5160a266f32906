"""`fastidc search`: pairs by a sentence, captions by a pair, and embeddings that are kept."""

import json

import pytest
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import CAPTIONS, image_pairs, run_folder

from fastidc import embed_pairs, embed_texts, rank
from fastidc.cli import main
from fastidc.describe import search as searching

QUERY = "the red cube left of the sphere moved"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"), captioner=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    image_pairs(root, 5)
    return root


@pytest.fixture(scope="module")
def order(run, folder):
    """(id, cosine) of the folder's pairs, nearest to the query first."""
    pairs = embed_pairs(run, [(folder / f"{i}.png", folder / f"{i}_2.png") for i in range(5)])
    return [(str(i), score) for i, score in rank(embed_texts(run, [QUERY])[0], pairs)]


def search(*argv):
    return main(["search", *map(str, argv), "--device", "cpu"])


def check(rows, order):
    assert [row["rank"] for row in rows] == list(range(1, len(order) + 1))
    assert [row["id"] for row in rows] == [name for name, _ in order]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in order], abs=1e-5)


def test_a_sentence_ranks_the_pairs_of_a_folder(run, folder, order, capsys):
    assert search(QUERY, "--pairs", folder, "--model", run, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    check(rows, order)
    assert rows[0]["before"] == str(folder / f"{order[0][0]}.png")
    assert search(QUERY, "--pairs", folder, "--model", run, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [name for name, _ in order[:2]]


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_pair_ranks_the_captions_of_a_file(run, folder, tmp_path, capsys, suffix):
    file = tmp_path / f"captions{suffix}"
    file.write_text(json.dumps(CAPTIONS) if suffix == ".json" else "\n".join([CAPTIONS[0], "", *CAPTIONS]) + "\n")
    pair = folder / "1.png", folder / "1_2.png"
    assert search("--before", pair[0], "--after", pair[1], "--captions", file, "--model", run, "--json", "--top", 4) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = rank(embed_pairs(run, [pair])[0], embed_texts(run, CAPTIONS), 4)
    assert [row["caption"] for row in rows] == [CAPTIONS[i] for i, _ in expected]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_kept_embeddings_are_not_made_again(run, folder, order, capsys, tmp_path, monkeypatch):
    index = tmp_path / "pairs.npz"
    assert search(QUERY, "--pairs", folder, "--model", run, "--save", index, "--json") == 0
    check(json.loads(capsys.readouterr().out), order)
    monkeypatch.setattr(searching, "embed_pairs", None)
    assert search(QUERY, "--index", index, "--model", run, "--json") == 0
    check(json.loads(capsys.readouterr().out), order)
    assert search("--before", folder / "0.png", "--after", folder / "1.png", "--index", index, "--model", run) == 2
    assert "holds pairs, and captions are searched" in capsys.readouterr().err
    other = run_folder(tmp_path / "other", captioner=False, seed=5)
    assert search(QUERY, "--index", index, "--model", other) == 2
    assert "was made by another model" in capsys.readouterr().err


def test_an_index_of_images_that_changed_is_refused(run, tmp_path, capsys):
    image_pairs(tmp_path / "own", 2)
    assert search(QUERY, "--pairs", tmp_path / "own", "--model", run, "--save", tmp_path / "i.npz") == 0
    worlds.noise_image(tmp_path / "own" / "1_2.png", 9, (31, 30))
    assert search(QUERY, "--index", tmp_path / "i.npz", "--model", run) == 2
    assert "1_2.png has changed since the index was made" in capsys.readouterr().err


def test_captions_can_be_kept_too(run, folder, tmp_path, capsys):
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    pair = ["--before", folder / "1.png", "--after", folder / "1_2.png", "--model", run, "--json"]
    assert search(*pair, "--captions", tmp_path / "c.txt", "--save", tmp_path / "c.npz") == 0
    first = json.loads(capsys.readouterr().out)
    assert search(*pair, "--index", tmp_path / "c.npz") == 0
    assert json.loads(capsys.readouterr().out) == first
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS[:2]))
    assert search(*pair, "--index", tmp_path / "c.npz") == 2
    assert "c.txt has changed" in capsys.readouterr().err


def test_a_bad_image_is_left_out(run, tmp_path, capsys):
    image_pairs(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no image")
    assert search(QUERY, "--pairs", tmp_path, "--model", run, "--json", "--save", tmp_path / "i.npz") == 1
    shown = capsys.readouterr()
    assert sorted(row["id"] for row in json.loads(shown.out)) == ["0", "2"]
    assert "1 is left out" in shown.err
    assert search(QUERY, "--index", tmp_path / "i.npz", "--model", run, "--json") == 0
    assert sorted(row["id"] for row in json.loads(capsys.readouterr().out)) == ["0", "2"]


def test_a_bad_row_is_left_out(run, folder, capsys):
    (folder / "t.csv").write_text("id,before,after\na,0.png,0_2.png\nb,1.png\nc,2.png,2_2.png\n")
    assert search(QUERY, "--pairs", folder / "t.csv", "--model", run, "--json") == 1
    shown = capsys.readouterr()
    assert sorted(row["id"] for row in json.loads(shown.out)) == ["a", "c"]
    assert f"line 3 is left out: {folder / 't.csv'}: line 3 has 2 cells" in shown.err
    assert "1 pairs are left out" in shown.err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "one thing is looked for"),
        (["x", "--before", "{0}/0.png", "--after", "{0}/1.png", "--pairs", "{0}"], "one thing is looked for"),
        (["--before", "{0}/0.png"], "give both"),
        (["x"], "what is searched"),
        (["x", "--pairs", "{0}", "--index", "i.npz"], "one of the two"),
        (["x", "--index", "i.npz", "--save", "j.npz"], "--save keeps"),
        (["x", "--pairs", "{0}", "--save", "i.bin"], "ends in .npz"),
        (["x", "--pairs", "{0}", "--top", "0"], "--top"),
        (["x", "--index", "{0}/absent.npz"], "no such index"),
        (["zebra", "--pairs", "{0}"], "no word that"),
        (["x", "--pairs", "{0}/absent"], "no such data folder"),
        (["--before", "{0}/0.png", "--after", "{0}/1.png", "--captions", "{0}/absent.txt"], "no such file of captions"),
        (["--before", "{0}/0.png", "--after", "{0}/absent.png", "--captions", "{1}"], "absent.png: no such image"),
        (["--before", "{0}/0.png", "--after", "{0}", "--captions", "{1}"], "is a folder; name an image in it"),
        (["--before", "{0}/0.png", "--after", "{0}/1.png", "--captions", "{2}"], "field '[]'"),
    ],
)
def test_wrong_input_is_a_sentence(run, folder, tmp_path, capsys, argv, sentence):
    (tmp_path / "c.txt").write_text("it moved\n")
    (tmp_path / "c.json").write_text('{"a": 1}')
    words = [word.format(folder, tmp_path / "c.txt", tmp_path / "c.json") for word in argv]
    assert search(*words, "--model", run) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastidc: ")
    assert sentence in error
