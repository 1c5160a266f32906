"""What the check finds bad is left out by `load_records`, whole, and nothing else is."""

import json

import check_cases
import pytest
from check_cases import WORLDS, edit

from fastidc.data import quarantine
from fastidc.data.check import check
from fastidc.data.records import load_records
from fastidc.errors import FastidcError


def quarantined(tree, *args, **kwargs):
    return check(tree, *args, progress=False, **kwargs).write_quarantine(tree / "bad.json")


def ids(records):
    return {split: [record.id for record in part] for split, part in records.items()}


@pytest.mark.parametrize("kind", WORLDS)
def test_bad_images_of_every_reader(tmp_path, kind):
    tree = WORLDS[kind](tmp_path / "own")
    whole = load_records(tree)
    gone, damaged = whole["train"][0], whole["test"][0]
    gone.after.unlink()
    damaged.after.write_bytes(b"")
    with pytest.raises(FastidcError, match="image is missing"):
        load_records(tree)
    file, said = quarantined(tree), []
    records = load_records(tree, report=said.append, quarantine=file)
    expected = {split: [record for record in part if record.id not in (gone.id, damaged.id)] for split, part in whole.items()}
    assert records == expected
    assert said == [f"{file}: 2 pairs are left out (1 of train, 1 of test): image-missing 1, image-empty 1."]


def test_bad_annotations_with_and_without_an_id(tmp_path):
    tree = check_cases.ier(tmp_path / "own")
    whole = load_records(tree)
    edit(tree / "train.json", lambda t: [{"uid": None, "img0": "a.jpg", "img1": "b.png", "sents": ["x"]}, *t, t[1] | {"sents": [3]}, "y"])
    with pytest.raises(FastidcError, match=r"train.json: \[0\], field 'uid' is None"):
        load_records(tree)
    file = quarantined(tree)
    held = json.loads(file.read_text())
    assert [pair.get("id", pair.get("place")) for pair in held["pairs"]] == ["train.json: [0]", "Z_3", "train.json: [4]"]
    assert {reason["kind"] for pair in held["pairs"] for reason in pair["reasons"]} == {"id", "captions", "duplicate", "layout"}
    records = load_records(tree, quarantine=file)
    assert records == whole | {"train": whole["train"][:1]}, "both entries of the id that stands twice"
    assert load_records(tree.rename(tmp_path / "moved"), quarantine=tmp_path / "moved" / "bad.json").keys() == whole.keys()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_bad_rows(tmp_path, suffix):
    tree = check_cases.table(tmp_path / "own", suffix)
    path, whole = tree / f"pairs.{suffix}", load_records(tree)
    bad = "one,two\n" if suffix == "csv" else '{"before": 1\n'
    path.write_text(path.read_text() + bad)
    with pytest.raises(FastidcError, match=r"line [56]"):
        load_records(tree)
    assert load_records(tree, quarantine=quarantined(tree)) == whole


def test_images_that_no_pair_has(tmp_path):
    tree = check_cases.folder(tmp_path / "own")
    whole = load_records(tree)
    check_cases.worlds.noise_image(tree / "12.png")
    with pytest.raises(FastidcError, match="image has no captions"):
        load_records(tree)
    assert load_records(tree, quarantine=quarantined(tree)) == whole


def test_blank_pairs_in_quarantine(tmp_path):
    """A pair that --empty drop leaves out anyway may be in quarantine, too."""
    tree = check_cases.spot(tmp_path / "own")
    edit(tree / "train.json", lambda t: [t[0] | {"sentences": [""]}, t[1]])
    (tree / "resized_images" / "76.png").write_bytes(b"")
    said = []
    assert ids(load_records(tree, report=said.append, quarantine=quarantined(tree)))["train"] == ["9.png"]
    assert len(said) == 1, "the sentence about blank ones has nothing left to tell"


def test_a_drawn_split_stays_as_it_was(tmp_path):
    rows = [{"before": f"{i}a.png", "after": f"{i}b.png", "caption": "gone"} for i in range(20)]
    tree = tmp_path / "own"
    check_cases.worlds.table_file(tree / "pairs.csv", rows)
    check_cases.different_images(tree)
    whole = load_records(tree)
    bad = whole["test"][0]
    bad.before.unlink()
    records = load_records(tree, quarantine=quarantined(tree))
    assert ids(records) == ids(whole) | {"test": [record.id for record in whole["test"] if record.id != bad.id]}


def test_nothing_bad_is_an_empty_quarantine(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    assert load_records(tree, quarantine=quarantined(tree)) == load_records(tree)


def test_quarantines_of_others_are_refused(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    (tree / "resized_images" / "9.png").unlink()
    file = quarantined(tree)

    def refuse(sentence, root=tree, path=file):
        with pytest.raises(FastidcError, match=sentence) as caught:
            load_records(root, quarantine=path)
        assert "\n" not in str(caught.value)

    refuse("the kind spot, and this one is ier; make it again with `fastidc check", check_cases.ier(tmp_path / "other"))
    edit(tree / "val.json", lambda t: [t[0] | {"sentences": ["corrected"]}])
    refuse("another data set, or of this one before its annotations changed")
    quarantined(tree)
    (tree / "resized_images" / "31.png").unlink()
    refuse("31.png: image is missing")
    value = json.loads(file.read_text())
    for change, sentence in (
        ({"pairs": [*value["pairs"], {"id": "no", "reasons": []}]}, "the data set has no pair 'no'; make it again"),
        ({"pairs": [{"id": 3, "reasons": []}]}, r"pairs\[0\] must have an id"),
        ({"pairs": [{"id": "x"}]}, r"pairs\[0\] must have an id"),
        ({"pairs": None}, "field 'pairs' is missing or not a list"),
        ({"version": 2}, "a quarantine of version 2"),
        ({"format": "x"}, "is no quarantine of fastidc"),
    ):
        file.write_text(json.dumps(value | change))
        refuse(sentence)
    file.write_text("{")
    refuse("cannot be read as a quarantine")
    file.unlink()
    refuse("no such quarantine; make it with")


def test_what_is_fatal_is_in_no_quarantine(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    (tree / "val.json").write_text("{")
    with pytest.raises(FastidcError, match="cannot be read, whatever is left out"):
        quarantined(tree, "spot")
    assert not (tree / "bad.json").exists()


def test_without_is_pure(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    records = load_records(tree)
    held = quarantine.Quarantine(tmp_path / "q.json", "spot", "", {"9.png": (("image-empty", "x"),)})
    assert ids(quarantine.without(records, held)) == {"train": ["76.png"], "val": ["31.png"], "test": ["8.png"]}
    assert ids(records)["train"] == ["76.png", "9.png"], "what was given is left alone"
    with pytest.raises(FastidcError, match=r"q.json: the data set has no pair 'z' nor 1 more"):
        quarantine.without(records, quarantine.Quarantine(tmp_path / "q.json", "spot", "", {"z": (), "y": ()}))
    assert quarantine.without(records, quarantine.Quarantine(tmp_path / "q.json", "spot", "", {"z": ()}), {"z"}) == records
