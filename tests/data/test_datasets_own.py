"""Data of one's own, a table or a folder of pairs; recognising layouts."""

import json
import random

import pytest
import worlds
from test_datasets import refuse, short

from fastidc.data.datasets.base import Entry
from fastidc.data.datasets.splitting import hashed_split
from fastidc.data.records import load_records

ROWS = [
    {"before": "b/1.png", "after": "a/1.png", "caption": "a tree, felled", "split": "train", "type": "drop"},
    {"before": "b/2.png", "after": "a/2.png", "caption": "a house", "split": "validation", "type": ""},
    {"before": "b/1.png", "after": "a/1.png", "caption": 'the "oak" is gone', "split": "train", "type": "drop"},
    {"before": "b/3.png", "after": "a/4.png", "caption": "", "split": "test", "type": "add"},
    {"before": "b/5.png", "after": "a/5.png", "caption": "a pond", "split": "test", "type": "add"},
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_read(tmp_path, suffix):
    path, said = worlds.table_file(tmp_path / "own" / f"pairs.{suffix}", ROWS), []
    records = load_records(path, report=said.append)
    assert short(records) == {
        "train": [("1", "1.png", "1.png", ("a tree, felled", 'the "oak" is gone'))],
        "val": [("2", "2.png", "2.png", ("a house",))],
        "test": [("5", "5.png", "5.png", ("a pond",))],
    }
    assert [records[split][0].type for split in records] == ["drop", None, "add"]
    assert said == ["table: 1 empty sentence of test left out, and 1 pair that had no other (--empty keep leaves them in)."]
    assert load_records(path.parent) == records
    kept = load_records(path.parent, "table", empty="keep")["test"]
    assert (kept[0].id, kept[0].captions) == ("3-4", ("",))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_records(path) == records, "a byte order mark"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_several_captions_distractors_and_ids(tmp_path, suffix):
    lists = {"captions": ["one", "two"], "no_change_captions": ["same", "no change"]}
    lists = lists if suffix == "jsonl" else {field: " | ".join(texts) for field, texts in lists.items()}
    names = {"before": "x.png", "after": "y.png", "distractor": "z.png", "split": "train"}
    rows = [{"id": "p1", **names, **lists}, {"id": "p2", **names, **lists}, {"id": "p1", **names, **lists}]
    first, second = load_records(worlds.table_file(tmp_path / f"any.{suffix}", rows))["train"]
    assert (first.id, second.id) == ("p1", "p2")
    assert first.captions == ("one", "two", "one", "two")
    assert first.no_change_captions == ("same", "no change")
    assert [path.name for path in first.images] == ["x.png", "y.png", "z.png"]


def test_ids_that_meet_take_their_folders_in(tmp_path):
    rows = [{"before": f"{site}/b/1.png", "after": f"{site}/a/1.png", "caption": site} for site in ("n", "s")]
    rows.append({"before": "n/b/2.png", "after": "n/a/2.png", "caption": "x"})
    records = load_records(worlds.table_file(tmp_path / "pairs.csv", rows))
    assert [record.id for record in records["train"]] == ["n_b_1-n_a_1", "s_b_1-s_a_1", "2"]


def test_images_elsewhere(tmp_path):
    path = worlds.table_file(tmp_path / "own" / "pairs.csv", ROWS)
    table = path.rename(tmp_path / "pairs.csv")
    refuse(r"b/1.png: image is missing, but .*pairs.csv: line 2, field 'before' names it", table)
    assert load_records(table, images=tmp_path / "own")["val"][0].after == tmp_path / "own" / "a" / "2.png"


HEAD = "before,after,caption,id,split,type"
GOOD = "x.png,x.png,text,p,train,"


@pytest.mark.parametrize(
    ("name", "lines", "sentence"),
    [
        ("t.csv", ["before,after,title"], r"t.csv: line 1, field 'title' is unknown; the fields are before, after, caption, captions, id,"),
        ("t.csv", ["before;after;caption"], r"t.csv: line 1 has its columns separated by ';'; use commas"),
        ("t.csv", ["before,after,before"], r"t.csv: line 1 has the field 'before' twice"),
        ("t.csv", ["before,caption"], r"t.csv: line 1 has no field 'after'; it needs before, after"),
        ("t.csv", [], r"t.csv: line 1 has no field 'before'"),
        ("t.csv", [HEAD], r"t.csv: has no pairs; write a row for each"),
        ("t.jsonl", [], r"t.jsonl: has no pairs"),
        ("t.jsonl", ['{"before": "x.png", "after": "x.png"}'], r"t.jsonl: line 1 has neither field 'caption' nor 'captions'"),
        ("t.csv", ["before,after"], r"t.csv: line 1 has neither field 'caption' nor 'captions'"),
        ("t.csv", ["before,after,caption,captions"], r"t.csv: line 1 has both fields 'caption' and 'captions'"),
        (
            "t.csv",
            ["before,after,caption,distractor", "x.png,x.png,t,"],
            r"t.csv: must have both fields 'distractor' and 'no_change_captions'",
        ),
        (
            "t.csv",
            [HEAD, GOOD, "", "x.png,x.png,a car, gone,p,train,"],
            r"t.csv: line 4 has 7 cells, but line 1 names 6 fields; a sentence",
        ),
        ("t.csv", [HEAD, GOOD, 'x.png,x.png,"open,p,train,'], r"t.csv: line 3 cannot be read as CSV \(.*\); see to its quotes"),
        ("t.csv", [HEAD, ",x.png,text,p,train,"], r"t.csv: line 2, field 'before' is empty; every row needs it"),
        ("t.csv", [HEAD, "x.png,x.png,text,,train,"], r"t.csv: line 2, field 'id' is empty"),
        ("t.csv", [HEAD, "x.png,x.png,text,p,,"], r"t.csv: line 2, field 'split' is empty"),
        ("t.csv", [HEAD, "x.png,x.png,text,p,dev,"], r"t.csv: line 2, field 'split' is 'dev'; one of train, val, valid"),
        (
            "t.csv",
            [HEAD, GOOD, "x.png,y.png,text,p,train,"],
            r"line 3, field 'after' is 'y.png', but .*line 2 has 'x.png' for the same pair 'p'",
        ),
        (
            "t.csv",
            [HEAD, GOOD, "x.png,x.png,more,p,test,"],
            r"line 3, field 'split' is 'test', but .*line 2 has 'train' for the same pair 'p'",
        ),
        ("t.csv", [HEAD, GOOD + "add", "x.png,x.png,more,p,train,drop"], r"line 3, field 'type' is 'drop', but .*line 2 has 'add'"),
        ("t.csv", [HEAD, "x.png,z.png,text,p,train,"], r"z.png: image is missing, but .*t.csv: line 2, field 'after' names it"),
        ("t.tsv", ["before\tafter\tcaption", "x.png\tx.png"], r"t.tsv: line 2 has 2 cells, but line 1 names 3 fields"),
        (
            "t.csv",
            ["before,after,caption,distractor,no_change_captions", "x.png,x.png,text,x.png,"],
            r"t.csv: line 2 \(pair 'x'\) needs both fields 'distractor' and 'no_change_captions' or neither",
        ),
        ("t.jsonl", ['{"before": "x.png", "after": "x.png"'], r"t.jsonl: line 1 cannot be read as JSON"),
        ("t.jsonl", ["", "[]"], r"t.jsonl: line 2 must be an object with before, after, got an empty list"),
        ("t.jsonl", ['{"befor": "x.png"}'], r"t.jsonl: line 1, field 'befor' is unknown"),
        (
            "t.jsonl",
            ['{"before": ["x.png"], "after": "x.png", "caption": "t"}'],
            r"t.jsonl: line 1, field 'before' must be text, got a list",
        ),
        (
            "t.jsonl",
            ['{"before": "x.png", "after": "x.png", "caption": ["t"]}'],
            r"line 1, field 'caption' must be one sentence, got a list",
        ),
        ("t.jsonl", ['{"before": "x.png", "after": "x.png", "captions": "t"}'], r"line 1, field 'captions' must be a non-empty list"),
        ("t.jsonl", ['{"before": "x.png", "after": "x.png", "captions": [1]}'], r"line 1, field 'captions'\[0\] must be a sentence, got 1"),
    ],
)
def test_wrong_tables(tmp_path, name, lines, sentence):
    worlds.noise_image(tmp_path / "x.png")
    worlds.noise_image(tmp_path / "y.png")
    (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    refuse(sentence, tmp_path / name)


def test_ids_that_meet_in_every_way(tmp_path):
    rows = [{"before": name, "after": "y.png", "caption": "t"} for name in ("x.png", "x.jpg")]
    refuse(
        r"pairs.csv: line 3 has the id 'x-y' in train, which stands already in .*line 2", worlds.table_file(tmp_path / "pairs.csv", rows)
    )


def test_tables_that_cannot_be_told_or_read(tmp_path):
    worlds.table_file(tmp_path / "pairs.csv", ROWS)
    worlds.table_file(tmp_path / "pairs.jsonl", ROWS)
    refuse(r"one of pairs.csv, .* was expected, found pairs.csv and pairs.jsonl; name the file itself", tmp_path)
    (tmp_path / "pairs.csv").write_bytes(b"before,after,caption\nx,y,caf\xe9\n")
    refuse(r"pairs.csv: cannot be read as UTF-8 text", tmp_path / "pairs.csv")
    refuse(r"absent.csv: no such data folder", tmp_path / "absent.csv")
    (tmp_path / "pairs.xlsx").write_bytes(b"")
    refuse(r"pairs.xlsx: a table ends in .csv, .tsv, .jsonl", tmp_path / "pairs.xlsx", "table")
    refuse(r"pairs.xlsx: not a known data set;.*this is a file", tmp_path / "pairs.xlsx")
    refuse(r"pairs.csv: a file, but --dataset spot needs a folder", tmp_path / "pairs.csv", "spot")


@pytest.mark.parametrize(("count", "held"), [(0, 0), (4, 0), (5, 1), (19, 1), (20, 2), (105, 10)])
def test_drawn_split(count, held):
    entries, said = [Entry(f"id{i}", "", "", ("t",), "") for i in range(count)], []
    split = hashed_split("mine", entries, said.append)
    assert {name: len(part) for name, part in split.items()} == {"train": count - 2 * held, "val": held, "test": held}
    assert said == [
        f"mine: no split is given, so the pairs are split by a hash of their ids: {count - 2 * held} train, {held} val, {held} test."
    ]
    assert all(part == sorted(part, key=entries.index) for part in split.values())
    again = hashed_split("mine", random.Random(0).sample(entries, count), None)
    assert {name: {e.id for e in part} for name, part in again.items()} == {name: {e.id for e in part} for name, part in split.items()}


def test_drawn_split_is_this_one():
    """Pinned: a later version must not move pairs between splits."""
    split = hashed_split("", [Entry(f"{i}", "", "", (), "") for i in range(30)], None)
    assert [[e.id for e in split[name]] for name in ("val", "test")] == [["1", "2", "3"], ["5", "6", "12"]]


CAPTIONS = {"10": ["a car left", "gone"], "7": ["a van came"]}


def test_folders_read(tmp_path):
    tree = worlds.pair_folder(tmp_path / "own", CAPTIONS, "webp")
    expected = [("10", "10.webp", "10_2.webp", ("a car left", "gone")), ("7", "7.webp", "7_2.webp", ("a van came",))]
    assert short(load_records(tree)) == {"train": expected, "val": [], "test": []}
    (tree / "splits.json").write_text(json.dumps({"train": ["10"], "valid": [7]}))
    assert short(load_records(tree)) == {"train": expected[:1], "val": expected[1:], "test": []}
    (tree / "captions.json").write_text(json.dumps(CAPTIONS | {"7": "a van came"}))
    assert short(load_records(tree))["val"] == expected[1:]
    (tree / "splits.json").unlink()
    (tree / "captions.json").unlink()
    worlds.noise_image(tree / "7_diff.jpg")
    for id_, captions in CAPTIONS.items():
        (tree / f"{id_}.txt").write_text("\n".join([*captions, "", ""]))
    (tree / "README.txt").write_text("mine\n")
    assert short(load_records(tree))["train"] == expected
    (tree / "images").mkdir()
    for file in [*tree.glob("*.webp"), *tree.glob("*_diff.jpg")]:
        file.rename(tree / "images" / file.name)
    assert short(load_records(tree, "folder"))["train"] == expected, "texts may lie apart from the images"
    for file in tree.glob("*.txt"):
        file.rename(tree / "images" / file.name)
    assert short(load_records(tree))["train"] == expected
    (tree / "images" / "7.txt").write_text("\n")
    said = []
    assert short(load_records(tree, report=said.append))["train"] == expected[:1]
    assert "folder: 1 empty sentence of train left out, and 1 pair that had no other" in said[1]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_folders_with_a_table_of_captions(tmp_path, suffix):
    tree = worlds.pair_folder(tmp_path / "own", CAPTIONS)
    (tree / "captions.json").unlink()
    rows = [{"id": id_, "caption": text, "split": "test", "type": "t"} for id_ in ("7", "10") for text in CAPTIONS[id_]]
    path = worlds.table_file(tree / f"captions.{suffix}", rows)
    records = load_records(tree)
    assert [(r.id, r.captions, r.type) for r in records["test"]] == [("7", ("a van came",), "t"), ("10", ("a car left", "gone"), "t")]
    (tree / "splits.json").write_text("{}")
    refuse(rf"splits.json: captions.{suffix} has a field 'split' already", tree)
    (tree / "splits.json").unlink()
    worlds.table_file(path, [*rows, {"id": "7", "caption": "x", "split": "val", "type": ""}])
    refuse(rf"captions.{suffix}: line [45], field 'split' is val, but id '7' is test above", tree)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("captions.json", ["x"], r"captions.json: must be an object of id -> sentence"),
        ("captions.json", CAPTIONS | {"7": 3}, r"captions.json, field '7' must be a non-empty list of sentences, got a int"),
        ("captions.json", CAPTIONS | {"7": ["a", None]}, r"captions.json, field '7'\[1\] must be a sentence, got None"),
        ("captions.json", CAPTIONS | {"8": "t"}, r"8.\*: image is missing, but .*captions.json: '8' names it; put it there.*--images"),
        ("captions.json", {"7": "t"}, r"10.png: image has no captions: '10' is no id; caption the pair or take the image out"),
        ("splits.json", [], r"splits.json: must be an object of split -> list of ids, got an empty list"),
        ("splits.json", {"dev": []}, r"splits.json, field 'dev' is no split; the splits are train, val, valid"),
        ("splits.json", {"val": "7"}, r"splits.json, field 'val' must be a list of ids, got a str"),
        ("splits.json", {"train": ["7", "12"]}, r"splits.json: train\[1\] is '12', which has no captions"),
        ("splits.json", {"train": ["7", "10"], "val": [7]}, r"splits.json: val\[0\] is 7, which stands already at train\[0\]"),
        ("splits.json", {"train": ["7"]}, r"splits.json: id '10' of .*captions.json: '10' is in no split"),
    ],
)
def test_wrong_folders(tmp_path, file, content, sentence):
    tree = worlds.pair_folder(tmp_path / "own", CAPTIONS)
    (tree / file).write_text(json.dumps(content))
    refuse(sentence, tree, "folder")


def test_folders_with_two_files_of_a_kind(tmp_path):
    tree = worlds.pair_folder(tmp_path / "own", CAPTIONS)
    worlds.noise_image(tree / "7_2.jpg")
    refuse(r"captions.json: '7' may mean either: both 7_2.jpg and 7_2.png lie in", tree)
    (tree / "captions.csv").write_text("id,caption\n")
    refuse(r"one of captions.json, .* was expected, found captions.json and captions.csv", tree)
    refuse(r"was expected, found none", tmp_path, "folder")


def test_layouts_that_are_mixed_or_none(tmp_path):
    tree = worlds.pair_folder(tmp_path / "own", CAPTIONS)
    worlds.spot_tree(tree / "images", {"train": [("1", ["t"])]}, folder="..")
    refuse(r"own: mixed layouts, train.json with img_id \(spot\), captions.json \(folder\); choose one of them with --dataset", tree)
    (tree / "pairs.csv").write_text("")
    refuse(r"mixed layouts, .* pairs.csv \(table\)", tree)
    refuse(r"dataset is 'sopt'; one of auto, clevr, spot, ier, birds, table, folder was expected", tree, "sopt")
    refuse(r"empty is 'no'; one of drop, keep was expected", tree, empty="no")
    refuse(r"not a known data set;.*found here: 1.png, 1_2.png; name its kind with --dataset", tree / "images" / "resized_images")
    (tmp_path / "empty").mkdir()
    refuse(r"this folder is empty", tmp_path / "empty")
    refuse(r"no annotations of Spot-the-Diff here \(reformat_train.json,", tmp_path / "empty", "spot")
    refuse(r"no annotations of Image-Editing-Request here", tmp_path / "empty", "ier")
    refuse(r"one .tsv with the columns .* was expected, found none", tmp_path / "empty", "birds")


def test_spot_and_ier_in_one_folder_are_mixed(tmp_path):
    tree = worlds.spot_tree(tmp_path / "both", {"train": [("1", ["t"])]})
    worlds.ier_tree(tree, {"valid": [("u", "a.png", "b.png", ["t"])]})
    refuse(r"mixed layouts, train.json with img_id \(spot\), valid.json with img0 \(ier\)", tree)
    refuse(r"train.json: \[0\] has no field 'img0'", tree, "ier")


def test_clevr_says_that_images_have_no_effect(tmp_path):
    tree, said = worlds.clevr_tree(tmp_path / "data", {"train": [1], "val": [], "test": []}), []
    assert load_records(tree, images=tmp_path, report=said.append) == load_records(tree, "clevr")
    assert "--images has no effect" in said[0]
