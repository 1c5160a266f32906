"""CLEVR-Change's own layout: what is read, and every sentence for what is wrong."""

import json

import golden
import pytest
import worlds

from fastidc.data.records import load_records
from fastidc.errors import FastidcError

SPLITS = {"train": [3, 1, 7], "val": [2], "test": [5, 4]}


@pytest.fixture
def tree(tmp_path):
    return worlds.clevr_tree(tmp_path / "data", SPLITS)


def test_records_follow_the_files(tree):
    records = load_records(tree)
    assert {split: [r.id for r in rs] for split, rs in records.items()} == {
        "train": ["000003.png", "000001.png", "000007.png"],
        "val": ["000002.png"],
        "test": ["000005.png", "000004.png"],
    }
    first = records["train"][0]
    assert [p.name for p in first.images] == ["CLEVR_default_000003.png", "CLEVR_semantic_000003.png", "CLEVR_nonsemantic_000003.png"]
    assert first.no_change_id == "000003.png_n"
    assert first.type == "color"
    assert len(first.captions) == len(first.no_change_captions) == 2
    assert load_records(tree.parent) == records, "the folder that holds data/ serves as well"


def edit(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


def without(key):
    return lambda table: {k: v for k, v in table.items() if k != key}


KEY = "CLEVR_default_000001.png"


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (
            "splits.json",
            lambda s: s | {"val": [2, 7]},
            r"splits.json: val\[1\] is scene 7, which stands already at train\[2\]; keep it in one place",
        ),
        ("splits.json", lambda s: s | {"val": ["2"]}, r"splits.json: val\[0\] is '2'; a scene number"),
        ("splits.json", without("test"), 'splits.json: must be an object with the lists "train", "val" and "test"'),
        (
            "splits.json",
            lambda s: s | {"val": [9]},
            r"change_captions.json: has no field 'CLEVR_default_000009.png', but .*splits.json: val\[0\] lists it as 9",
        ),
        ("change_captions.json", without(KEY), rf"change_captions.json: has no field '{KEY}', but .*splits.json: train\[1\] lists it as 1"),
        (
            "change_captions.json",
            lambda t: t | {KEY: "a sentence"},
            rf"change_captions.json, field '{KEY}' must be a non-empty list of sentences",
        ),
        ("change_captions.json", lambda t: t | {KEY: []}, "must be a non-empty list of sentences, got an empty list"),
        (
            "no_change_captions.json",
            lambda t: t | {KEY: ["fine", 3]},
            rf"no_change_captions.json, field '{KEY}'\[1\] must be a sentence, got 3",
        ),
        ("no_change_captions.json", lambda t: t | {KEY: ["  "]}, r"\[0\] must be a sentence, got '  '"),
        ("change_captions.json", list, "change_captions.json: must be an object of image name"),
        ("type_mapping.json", lambda t: {"color": "all"}, "type_mapping.json: must be an object of change type"),
    ],
)
def test_wrong_annotations(tree, file, change, sentence):
    edit(tree / file, change)
    with pytest.raises(FastidcError, match=sentence) as caught:
        load_records(tree)
    assert "\n" not in str(caught.value)


def test_files_that_are_absent_or_no_json(tree):
    (tree / "change_captions.json").write_text('{"a": ')
    with pytest.raises(FastidcError, match=r"change_captions.json: cannot be read as JSON"):
        load_records(tree)
    (tree / "change_captions.json").unlink()
    with pytest.raises(FastidcError, match=r"change_captions.json: no such file"):
        load_records(tree)
    with pytest.raises(FastidcError, match="no such data folder"):
        load_records(tree / "absent")
    with pytest.raises(FastidcError, match=r"not a known data set; CLEVR-Change has splits\.json"):
        load_records(tree / "images")


def test_images_that_are_absent(tree):
    (tree / "nsc_images" / "CLEVR_nonsemantic_000005.png").unlink()
    with pytest.raises(
        FastidcError, match=r"nsc_images/CLEVR_nonsemantic_000005.png: image is missing, but .*splits.json: test\[0\] names it"
    ):
        load_records(tree)


def test_byte_order_mark_is_read(tree):
    path = tree / "splits.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_records(tree)["train"]) == 3


def test_real_splits_and_types_parse(tmp_path):
    """The released splits and types through the same reader, with captions and empty image files of our own."""
    source = golden.annotation_files() / "clevr_change"
    splits = json.loads((source / "splits.json").read_text())
    assert {k: len(v) for k, v in splits.items()} == {"train": 33830, "val": 1988, "test": 3985}
    small = {k: v[:: len(v) // 40][:40] for k, v in splits.items()}
    tree = worlds.clevr_tree(tmp_path / "data", small)
    (tree / "type_mapping.json").write_text((source / "type_mapping.json").read_text())
    records = load_records(tree)
    assert [len(records[k]) for k in ("train", "val", "test")] == [40, 40, 40]
    assert {r.type for rs in records.values() for r in rs} == {"color", "material", "add", "drop", "move"}
