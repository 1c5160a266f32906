"""Which pairs there are, with and without captions."""

import json

import pytest
import worlds
from describe.cases import image_pairs

from fastidc import FastidcError
from fastidc.data.records import load_records
from fastidc.describe.pairs import BadRow, Pair, read_pairs, stream_pairs


def of_records(records):
    return [(r.id, r.before, r.after) for split in ("train", "val", "test") for r in records[split]]


def as_rows(pairs):
    return [(pair.id, pair.before, pair.after) for pair in pairs]


@pytest.mark.parametrize("folder", ["", "images"])
def test_a_folder_needs_no_captions(tmp_path, folder):
    pairs = image_pairs(tmp_path / folder, 3)
    worlds.noise_image(tmp_path / folder / "0_diff.png")
    worlds.noise_image(tmp_path / folder / "lonely.jpg")
    said = []
    found = read_pairs(tmp_path, report=said.append)
    assert as_rows(found) == [(str(i), *pair) for i, pair in enumerate(pairs)]
    assert said == [f"{tmp_path / folder}: 1 images make no pair {{id}}, {{id}}_2 and are left out: lonely.jpg."]


def test_a_folder_with_captions_has_the_readers_pairs(tmp_path):
    worlds.pair_folder(tmp_path, {f"p{i}": ["it moved"] for i in range(6)})
    assert sorted(as_rows(read_pairs(tmp_path))) == sorted(of_records(load_records(tmp_path)))
    with pytest.raises(FastidcError, match="no splits"):
        read_pairs(tmp_path, "test")


def rows(count):
    return [{"before": f"{'xy'[i % 2]}/{i // 2}.png", "after": f"{'xy'[i % 2]}/{i // 2}b.png", "caption": "it moved"} for i in range(count)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("extra", [{}, {"id": "n{}"}])
def test_a_table_has_the_readers_pairs_with_captions_and_without(tmp_path, suffix, extra):
    table = [row | {name: value.format(i) for name, value in extra.items()} for i, row in enumerate(rows(6))]
    path = worlds.table_file(tmp_path / f"pairs{suffix}", table)
    expected = of_records(load_records(path))
    found = as_rows(read_pairs(path))
    assert sorted(found) == sorted(expected), "ids and paths as the reader of training gives them"
    assert [name for name, *_ in found] == (
        [f"n{i}" for i in range(6)] if extra else [f"{'xy'[i % 2]}_{i // 2}-{'xy'[i % 2]}_{i // 2}b" for i in range(6)]
    )
    for row in table:
        del row["caption"]
    assert as_rows(read_pairs(worlds.table_file(path, table))) == found
    assert as_rows(read_pairs(tmp_path)) == found, "a folder with pairs.csv is its table"


def test_rows_of_a_pair_are_one_pair_and_a_distractor_another(tmp_path):
    table = [
        {"id": "a", "before": "1.png", "after": "2.png", "split": "train", "distractor": "3.png"},
        {"id": "a", "before": "1.png", "after": "2.png", "split": "train", "distractor": "3.png"},
        {"id": "b", "before": "4.png", "after": "5.png", "split": "valid", "distractor": ""},
    ]
    path = worlds.table_file(tmp_path / "t.csv", table)
    assert as_rows(read_pairs(path)) == [
        (name, tmp_path / one, tmp_path / two)
        for name, one, two in (("a", "1.png", "2.png"), ("a_n", "1.png", "3.png"), ("b", "4.png", "5.png"))
    ]
    assert [pair.id for pair in read_pairs(path, "val")] == ["b"]
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert read_pairs(path, images=other)[2] == Pair("b", other / "4.png", other / "5.png")
    with pytest.raises(FastidcError, match="of the split test"):
        read_pairs(path, "test")


def test_a_data_set_has_its_splits_and_distractors(tmp_path):
    root = worlds.clevr_tree(tmp_path / "data", {"train": [0], "val": [1], "test": [2]})
    assert [pair.id for pair in read_pairs(root)] == [f"{i:06d}.png{tail}" for i in range(3) for tail in ("", "_n")]
    (change, none) = read_pairs(root, "test")
    record = load_records(root)["test"][0]
    assert as_rows([change, none]) == [(record.id, record.before, record.after), (record.no_change_id, record.before, record.distractor)]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("t.csv", "before,then\n", "line 1, field 'then' is unknown"),
        ("t.csv", "before\na\n", "line 1 has no field 'after'"),
        ("t.csv", "before,after,after\n", "twice"),
        ("t.csv", "before,after\n", "has no pairs"),
        ("t.csv", "before,after\na,b,c\n", "line 2 has 3 cells"),
        ("t.csv", b"before,\xff\xfe\na,b\n", "line 1 cannot be read as UTF-8"),
        ("t.csv", 'before,after\na,b\n"a,b\n', "quotes"),
        ("t.csv", "before,after,split\na,b,later\n", "split"),
        ("t.jsonl", '{"before": "a"}\n{"before": "b"}\n', "line 1 has no field 'after'"),
        ("t.jsonl", '{"before": "a", "after": ["b"]}\n', "line 1, field 'after' must be text"),
        ("t.jsonl", "[1]\n", "line 1 must be an object"),
        ("t.jsonl", "{\n", "line 1 cannot be read as JSON"),
        ("t.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_wrong_table_is_a_sentence_with_file_and_line(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FastidcError) as error:
        read_pairs(path, "train" if "split" in str(text) else "all")
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "called", "sentence"),
    [
        ("t.csv", "before,after\na,b\n,b\nc,d\n", "line 3", "line 3, field 'before' is empty"),
        ("t.csv", "before,after\na,b\nb\nc,d\n", "line 3", "line 3 has 1 cells"),
        ("t.csv", b"before,after\na,b\n\xe9,b\nc,d\n", "line 3", "line 3 cannot be read as UTF-8"),
        ("t.csv", "id,before,after\nx,a,b\nz,a,\ny,c,d\n", "z", "line 3, field 'after' is empty"),
        ("t.csv", "id,before,after\nx,a,b\nx,a,c\ny,c,d\n", "line 3", "line 3: id 'x' stands above with other images"),
        ("t.csv", "id,before,after\nx,a,b\n,e,f\ny,c,d\n", "line 3", "line 3, field 'id' is empty"),
        ("t.jsonl", '{"before": "a", "after": "b"}\n{"before": "a"}\n{"before": "c", "after": "d"}\n', "line 2", "has no field 'after'"),
        ("t.jsonl", '{"before": "a", "after": "b"}\n\n{\n{"before": "c", "after": "d"}\n', "line 3", "line 3 cannot be read as JSON"),
        ("t.jsonl", b'{"before": "a", "after": "b"}\n\xff\n{"before": "c", "after": "d"}\n', "line 2", "line 2 is not UTF-8 text"),
    ],
)
def test_a_wrong_row_costs_itself_only(tmp_path, name, text, called, sentence):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    first, bad, last = read_pairs(path)
    assert (first.before, first.after, last.before, last.after) == tuple(tmp_path / image for image in "abcd")
    assert isinstance(bad, BadRow)
    assert bad.id == called
    assert str(bad.error).startswith(str(path))
    assert sentence in str(bad.error)


def test_a_wrong_row_of_another_split_costs_nothing(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("before,after,split\na,b,train\n,c,test\n,d,train\ne,f,later\n")
    assert [pair.id for pair in read_pairs(table, "train")] == ["a-b", "line 4", "line 5"]


def test_a_folder_without_pairs_is_a_sentence(tmp_path):
    with pytest.raises(FastidcError, match="no such data folder"):
        read_pairs(tmp_path / "absent")
    worlds.noise_image(tmp_path / "one.png")
    with pytest.raises(FastidcError, match=r"one\.png"):
        read_pairs(tmp_path)
    with pytest.raises(FastidcError, match="split is 'late'"):
        read_pairs(tmp_path, "late")
    with pytest.raises(FastidcError, match="no such folder of images"):
        read_pairs(tmp_path, images=tmp_path / "absent")


def test_a_stream_names_its_pairs(tmp_path):
    lines = [
        {"before": "x/1.png", "after": "x/1_2.png"},
        {"before": "y/1.png", "after": "y/1_2.png"},
        {"id": 7, "before": "a", "after": "a"},
    ]
    found = list(stream_pairs([json.dumps(line) for line in lines[:1]] + ["\n"] + [json.dumps(line) for line in lines[1:]], tmp_path))
    assert [pair.id for pair in found] == ["1-1_2", "1-1_2#2", "7"]
    assert found[1] == Pair("1-1_2#2", tmp_path / "y/1.png", tmp_path / "y/1_2.png")
    _, twice, after = stream_pairs([json.dumps(lines[2])] * 2 + [json.dumps(lines[0])])
    assert twice.id == "line 2"
    assert str(twice.error).startswith("standard input: line 2: id '7' stands above")
    assert after.id == "1-1_2"
    (bad,) = stream_pairs(['{"id": 5}'])
    assert bad.id == "5"
    assert str(bad.error).startswith("standard input: line 1 has no field 'before'")
