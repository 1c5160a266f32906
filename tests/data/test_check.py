"""Each thing that can be wrong in annotations, planted in a small data set of each reader: file, place and field stand in its row."""

import json

import check_cases
import golden
import pytest
import worlds
from check_cases import WORLDS, edit, found

from fastidc.data.check import check
from fastidc.data.check_report import summary, table
from fastidc.errors import FastidcError


@pytest.mark.parametrize("kind", WORLDS)
def test_clean_sets_are_clean(tmp_path, kind):
    findings = check(WORLDS[kind](tmp_path / "own"), progress=False)
    assert (findings.dataset, findings.code, findings.problems) == (kind, 0, [])
    assert "nothing is wrong with any pair" in summary(findings)
    assert findings.facts["images"]["files"] > 5
    assert table(findings.problems) == ""


def put(index, **fields):
    return lambda rows: [*rows[:index], rows[index] | fields, *rows[index + 1 :]]


KEY = "CLEVR_default_000001.png"
CLEVR = [
    ("splits.json", lambda s: s | {"val": [2, 7]}, ("bad", "duplicate", "splits.json", "val[1]", "")),
    ("splits.json", lambda s: s | {"val": [2, "x"]}, ("bad", "id", "splits.json", "val[1]", "")),
    ("splits.json", lambda s: s | {"val": [2, 9]}, ("bad", "captions-missing", "change_captions.json", "", "")),
    ("splits.json", lambda s: {"train": [1]}, ("fatal", "layout", "splits.json", "", "")),
    ("splits.json", lambda s: s | {"val": []}, ("note", "in-no-split", "change_captions.json", "", "")),
    ("splits.json", lambda s: s | {"val": []}, ("note", "split-empty", ".", "", "")),
    ("change_captions.json", lambda t: t | {KEY: "text"}, ("bad", "captions", "change_captions.json", "", KEY)),
    ("change_captions.json", lambda t: t | {KEY: []}, ("bad", "captions", "change_captions.json", "", KEY)),
    ("no_change_captions.json", lambda t: t | {KEY: ["fine", 3]}, ("bad", "captions", "no_change_captions.json", "", f"{KEY}[1]")),
    ("change_captions.json", lambda t: t | {KEY: ["fine", " "]}, ("bad", "sentence-empty", "change_captions.json", "", f"{KEY}[1]")),
    ("change_captions.json", list, ("fatal", "layout", "change_captions.json", "", "")),
    ("change_captions.json", lambda t: t | {KEY: ["the\x0ccube left"]}, ("note", "characters", "splits.json", "train[1]", "")),
    ("change_captions.json", lambda t: t | {KEY: ["cube \ud800 left"]}, ("bad", "characters", "splits.json", "train[1]", "")),
    ("change_captions.json", lambda t: t | {KEY: ["word " * 40]}, ("note", "sentence-long", "splits.json", "train[1]", "")),
    ("type_mapping.json", lambda t: t | {"add": ["000001.png"]}, ("bad", "type", "type_mapping.json", "", "add[0]")),
]
SPOT = [
    ("train.json", lambda t: {"76": t}, ("fatal", "layout", "train.json", "", "")),
    ("train.json", lambda t: [*t, "x"], ("bad", "layout", "train.json", "[2]", "")),
    ("train.json", lambda t: [t[0], {"img_id": "9"}], ("bad", "field-missing", "train.json", "[1]", "")),
    ("train.json", put(1, img_id=None), ("bad", "id", "train.json", "[1]", "img_id")),
    ("train.json", put(1, img_id="99"), ("bad", "image-missing", "train.json", "[1]", "img_id")),
    ("train.json", put(1, img_id="31"), ("bad", "duplicate", "val.json", "[0]", "")),
    ("train.json", put(1, sentences="text"), ("bad", "captions", "train.json", "[1]", "sentences")),
    ("train.json", put(1, sentences=["a", 3]), ("bad", "captions", "train.json", "[1]", "sentences[1]")),
    ("train.json", put(1, sentences=["a", ""]), ("note", "sentence-empty", "train.json", "[1]", "sentences[1]")),
    ("train.json", put(1, sentences=[""]), ("note", "captions-none", "train.json", "[1]", "")),
    ("train.json", put(1, note="x"), ("note", "field-unknown", "train.json", "[1]", "note")),
]
IER = [
    ("train.json", put(1, uid=""), ("bad", "id", "train.json", "[1]", "uid")),
    ("train.json", put(1, uid="Z_2"), ("bad", "duplicate", "train.json", "[1]", "")),
    ("train.json", put(1, img1=4), ("bad", "image-name", "train.json", "[1]", "img1")),
    ("train.json", put(1, img0="zz.jpg"), ("bad", "image-missing", "train.json", "[1]", "img0")),
    ("train.json", put(1, img0="A.jpg"), ("bad", "image-capitals", "train.json", "[1]", "img0")),
    ("train.json", put(1, img0="../images/a.jpg"), ("bad", "path-outside", "train.json", "[1]", "img0")),
    ("train.json", put(1, sents=[]), ("bad", "captions", "train.json", "[1]", "sents")),
    ("valid.json", put(0, img0="a.jpg"), ("note", "split-shared", ".", "", "")),
    ("valid.json", lambda t: [{"uid": "x"}], ("bad", "field-missing", "valid.json", "[0]", "")),
]
FOLDER = [
    ("captions.json", lambda t: t | {"7": 3}, ("bad", "captions", "captions.json", "", "7")),
    ("captions.json", lambda t: t | {"7": ["a", None]}, ("bad", "captions", "captions.json", "", "7[1]")),
    ("captions.json", lambda t: t | {"7": ""}, ("note", "sentence-empty", "captions.json", "", "7")),
    ("captions.json", lambda t: t | {"8": "t"}, ("bad", "in-no-split", "splits.json", "", "")),
    ("captions.json", lambda t: {k: v for k, v in t.items() if k != "7"}, ("bad", "image-alone", "7.png", "", "")),
    ("splits.json", lambda s: s | {"dev": []}, ("fatal", "split", "splits.json", "", "dev")),
    ("splits.json", lambda s: s | {"train": ["10", "12"]}, ("bad", "captions-missing", "splits.json", "train[1]", "")),
    ("splits.json", lambda s: s | {"train": ["10", 7]}, ("bad", "duplicate", "splits.json", "val[0]", "")),
]


@pytest.mark.parametrize(
    ("kind", "file", "change", "row"),
    [(kind, *case) for kind, cases in {"clevr": CLEVR, "spot": SPOT, "ier": IER, "folder": FOLDER}.items() for case in cases],
)
def test_planted_in_json(tmp_path, kind, file, change, row):
    tree = WORLDS[kind](tmp_path / "own")
    edit(tree / file, change)
    findings = check(tree, kind, how="none", progress=False)
    rows = [(p.level, p.kind, p.file, p.place, p.field) for p in findings.problems]
    assert row in rows, rows
    assert findings.code == {"fatal": 2, "bad": 1, "note": 0}[rows[0][0]], "the worst stands first"
    assert all(p.fix or p.level == "fatal" or p.kind in ("captions", "type", "layout") for p in findings.problems)


HEAD = "id,before,after,caption,split"
GOOD = "p,p1.png,p2.png,the p is gone,train"
LINES = [
    ("csv", [HEAD, GOOD, "q,q1.png,q2.png,a car, gone,train"], ("bad", "cells", "pairs.csv", "line 3", "")),
    ("csv", [HEAD, GOOD, ",q1.png,q2.png,a car,train"], ("bad", "field-empty", "pairs.csv", "line 3", "id")),
    ("csv", [HEAD, GOOD, "q,,q2.png,a car,train"], ("bad", "field-empty", "pairs.csv", "line 3", "before")),
    ("csv", [HEAD, GOOD, "q,q1.png,q2.png,a car,dev"], ("bad", "split", "pairs.csv", "line 3", "split")),
    ("csv", [HEAD, GOOD, "q,q1.png,q2.png,,train"], ("note", "sentence-empty", "pairs.csv", "line 3", "caption")),
    ("csv", [HEAD, GOOD, "p,p1.png,q2.png,a car,train"], ("bad", "disagree", "pairs.csv", "line 3", "after")),
    ("csv", [HEAD, GOOD, "p,p1.png,p2.png,a car,test"], ("bad", "disagree", "pairs.csv", "line 3", "split")),
    ("csv", [HEAD, GOOD, 'q,q1.png,q2.png,"open,train'], ("fatal", "quotes", "pairs.csv", "line 3", "")),
    ("csv", [f"{HEAD},title", f"{GOOD},x"], ("fatal", "field-unknown", "pairs.csv", "line 1", "title")),
    ("csv", [HEAD], ("fatal", "layout", "pairs.csv", "", "")),
    ("csv", [HEAD, GOOD, "q,/etc/no.png,q2.png,a car,train"], ("bad", "path-outside", "pairs.csv", "line 3", "before")),
    ("csv", [HEAD, GOOD, "q,Q1.PNG,q2.png,a car,train"], ("bad", "image-capitals", "pairs.csv", "line 3", "before")),
    ("tsv", [HEAD.replace(",", "\t"), "p\tp1.png"], ("bad", "cells", "pairs.tsv", "line 2", "")),
    ("jsonl", ['{"id": "p"'], ("bad", "json", "pairs.jsonl", "line 1", "")),
    ("jsonl", ["", "[]"], ("bad", "layout", "pairs.jsonl", "line 2", "")),
    ("jsonl", ['{"befor": "p1.png"}'], ("bad", "field-unknown", "pairs.jsonl", "line 1", "befor")),
    ("jsonl", ['{"before": ["x"], "after": "p2.png", "caption": "t"}'], ("bad", "field-type", "pairs.jsonl", "line 1", "before")),
    ("jsonl", ['{"before": "p1.png", "after": "p2.png", "captions": [1]}'], ("bad", "captions", "pairs.jsonl", "line 1", "captions[0]")),
    ("jsonl", ['{"before": "p1.png", "after": "p2.png", "caption": NaN}'], ("bad", "captions", "pairs.jsonl", "line 1", "caption")),
    ("jsonl", ['{"before": "p1.png", "after": "p2.png"}'], ("bad", "field-missing", "pairs.jsonl", "line 1", "")),
]


@pytest.mark.parametrize(("suffix", "lines", "row"), LINES)
def test_planted_in_tables(tmp_path, suffix, lines, row):
    tree = check_cases.table(tmp_path / "own", suffix)
    (tree / f"pairs.{suffix}").write_text("".join(line + "\n" for line in lines))
    assert row in found(tree, how="none")


@pytest.mark.parametrize(
    ("old", "new", "row"),
    [
        ("\tval\t", "\tdev\t", ("bad", "split", "line 3", "split")),
        ("\tval\t1", "\tval", ("bad", "cells", "line 3", "")),
        ("photos/11/large.jpg?141", "", ("bad", "image-name", "line 3", "img1ImgURL")),
        ("photos/11/", "photos/77/", ("bad", "image-missing", "line 3", "img1ImgURL")),
        ("It has a cap.", " ", ("note", "sentence-empty", "line 3", "description")),
        ("annN", "annotation", ("fatal", "field-unknown", "line 1", "")),
    ],
)
def test_planted_in_birds(tmp_path, old, new, row):
    tree = check_cases.birds(tmp_path / "own")
    path = next(tree.glob("*.tsv"))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    level, kind, place, field = row
    assert (level, kind, path.name, place, field) in found(tree, how="none")


def test_files_that_are_no_text_and_keys_that_stand_twice(tmp_path):
    tree = check_cases.folder(tmp_path / "own")
    (tree / "captions.json").write_text('{"10": "a", "7": "first", "5": "c", "7": "second"}')
    assert found(tree, how="none") == [("bad", "duplicate", "captions.json", "", "7")]
    (tree / "captions.json").write_bytes(b'{"10": "caf\xe9"}')
    assert found(tree, how="none")[0] == ("fatal", "file", "captions.json", "", "")
    (tree / "captions.json").unlink()
    for name, text in (("10", b"a car"), ("7", b"caf\xe9"), ("5", b"\n\n")):
        (tree / f"{name}.txt").write_bytes(text)
    assert found(tree, how="none") == [
        ("bad", "file", "7.txt", "", ""),
        ("note", "sentence-empty", "5.txt", "", "text"),
        ("note", "sentence-empty", "7.txt", "", "text"),
        ("note", "captions-none", "7.txt", "", ""),
        ("note", "captions-none", "5.txt", "", ""),
    ]


def test_a_broken_file_hides_no_other(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    (tree / "train.json").write_text("{")
    edit(tree / "val.json", put(0, sentences=7))
    (tree / "test.json").write_text("[")
    rows = found(tree, "spot", how="none")
    assert {(level, file) for level, _, file, *_ in rows} == {("fatal", "train.json"), ("fatal", "test.json"), ("bad", "val.json")}


def test_several_at_once_are_all_listed(tmp_path):
    tree = check_cases.ier(tmp_path / "own")
    edit(tree / "train.json", lambda t: [{"uid": None, "img0": 5, "img1": "", "sents": [1, "", None]}, "x", *t, t[0]])
    rows = found(tree, how="none")
    assert rows == [
        ("bad", "id", "train.json", "[0]", "uid"),
        ("bad", "image-name", "train.json", "[0]", "img0"),
        ("bad", "image-name", "train.json", "[0]", "img1"),
        ("bad", "captions", "train.json", "[0]", "sents[0]"),
        ("bad", "captions", "train.json", "[0]", "sents[2]"),
        ("bad", "layout", "train.json", "[1]", ""),
        ("bad", "duplicate", "train.json", "[4]", ""),
        ("note", "sentence-empty", "train.json", "[0]", "sents[1]"),
    ]


def test_distractors_of_some_and_names_that_meet(tmp_path):
    tree = check_cases.table(tmp_path / "own", "jsonl")
    rows = [json.loads(line) for line in (tree / "pairs.jsonl").read_text().splitlines()]
    rows = [row | {"distractor": "p1.png", "no_change_captions": ["no change"]} for row in rows]
    del rows[1]["distractor"], rows[1]["no_change_captions"]
    rows[2]["id"] = "p_n"
    (tree / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for row in found(tree, how="none") if row[0] == "bad"] == [
        ("bad", "duplicate", "pairs.jsonl", "line 1", ""),
        ("bad", "distractor", "pairs.jsonl", "line 2", "distractor"),
    ]


def test_real_spot():
    """The released annotations, without their images: what is known of them comes out."""
    folder = golden.annotation_files() / "spot_the_diff"
    findings = check(folder, "spot", how="none", progress=False)
    assert {split: facts["pairs"] for split, facts in findings.facts["splits"].items()} == {"train": 8566, "val": 1493, "test": 1270}
    assert sum(facts["sentences"] for facts in findings.facts["splits"].values()) == 23093
    assert [facts["empty"] for facts in findings.facts["splits"].values()] == [53, 6, 7]
    notes, bad = findings.count("note"), findings.count("bad")
    assert (notes["sentence-empty"], notes["captions-none"]) == (66, 37 + 4 + 7)
    assert findings.facts["longest_words"] == 56
    assert findings.facts["vocabulary"]["words"] == 2295
    assert 0 < findings.facts["truncated"]["77"] + findings.facts["truncated"]["32"] < 0.01
    assert (dict(bad), findings.code) == ({"image-missing": 2 * 11329}, 1)


@pytest.mark.slow
def test_real_ier():
    findings = check(golden.annotation_files() / "image_editing_request", "ier", how="none", progress=False)
    assert [facts["sentences"] for facts in findings.facts["splits"].values()] == [3061, 1149, 1485]
    assert set(findings.count("bad")) == {"image-missing"}
    assert len(findings.bad_pairs()) == 3061 + 383 + 495


def test_real_clevr_splits_and_types():
    """39,803 scenes whose captions nobody has: the files that are there are read, and those that are not are fatal."""
    rows = found(golden.annotation_files() / "clevr_change", "clevr", how="none")
    assert rows[:2] == [("fatal", "folder", name, "", "") for name in ("images", "sc_images")]
    assert ("fatal", "file", "change_captions.json", "", "") in rows
    assert not [row for row in rows if row[2] in ("splits.json", "type_mapping.json") and row[0] != "note"]


def test_what_cannot_be_checked_is_a_sentence(tmp_path):
    with pytest.raises(FastidcError, match="no such data folder"):
        check(tmp_path / "absent")
    with pytest.raises(FastidcError, match="not a known data set"):
        check(tmp_path)
    with pytest.raises(FastidcError, match="--max-words must be at least 3"):
        check(check_cases.spot(tmp_path / "own"), max_words=2)


def test_tables_on_any_terminal(tmp_path):
    tree = worlds.table_file(tmp_path / "pairs.csv", [{"before": "a.png", "after": "b.png", "caption": "x\u2028y"}])
    shown = table(check(tree, how="none", progress=False).problems)
    assert "U+2028" in shown
    assert len(shown.splitlines()) == 1 + len(found(tree, how="none"))
    assert len(table(check(tree, how="none", progress=False).problems, 1).splitlines()) == 3, "head, row, how many more"
