"""Spot-the-Diff, Image-Editing-Request and Birds-to-Words: what is read, in which order, and every sentence for what is wrong; images of every mode."""

import json

import golden
import numpy as np
import pytest
import worlds
from PIL import Image

from fastidc.data.datasets import birds, clevr, ier, spot
from fastidc.data.datasets.base import apply_empty
from fastidc.data.images import check_file, decode
from fastidc.data.records import load_records
from fastidc.errors import FastidcError

SPOT = {
    "train": [("76", ["a car is gone"]), ("9", ["", "two people left"]), ("76", ["the van moved", ""]), ("5", ["  "])],
    "val": [("31", ["nothing"])],
    "test": [("8", ["one"])],
}
IER = {
    "train": [("Z_2", "a.jpg", "b.png", ["make it dark"]), ("Z_3", "a.jpg", "c.gif", ["crop it", "cut"])],
    "valid": [("R_1", "d.JPG", "e.jpeg", ["brighter"])],
    "test": [("R_2", "d.JPG", "f.jpg", ["remove him"])],
}
BIRDS = [
    ("647514", "5595152", "train", "Animal 1 is brown. Animal 2 has a blue head."),
    ("11", "12", "val", 'It has a "cap".'),
    ("647514", "5595152", "train", "Animal 1 is much smaller."),
    ("13", "12", "test", "Same."),
]


def short(records):
    return {split: [(r.id, r.before.name, r.after.name, r.captions) for r in rs] for split, rs in records.items()}


def refuse(sentence, *args, **kwargs):
    with pytest.raises(FastidcError, match=sentence) as caught:
        load_records(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def with_entry(index, **fields):
    return lambda table: [*table[:index], table[index] | fields, *table[index + 1 :]]


def test_spot_merges_drops_and_keeps(tmp_path):
    tree, said = worlds.spot_tree(tmp_path / "spot", SPOT, folder="data/annotations"), []
    records = load_records(tree, report=said.append)
    assert short(records) == {
        "train": [
            ("76.png", "76.png", "76_2.png", ("a car is gone", "the van moved")),
            ("9.png", "9.png", "9_2.png", ("two people left",)),
        ],
        "val": [("31.png", "31.png", "31_2.png", ("nothing",))],
        "test": [("8.png", "8.png", "8_2.png", ("one",))],
    }
    assert said == [
        "spot: 3 empty sentences of train left out, and 1 pair that had no other (--empty keep leaves them in).",
    ]
    assert records["train"][0].distractor is None
    kept = load_records(tree, "spot", empty="keep", report=said.append)
    assert [r.captions for r in kept["train"]] == [("a car is gone", "the van moved", ""), ("", "two people left"), ("  ",)]
    assert said[1] == "spot: 3 empty sentences of train kept as empty captions (--empty drop leaves them out)."


def test_spot_reformatted_goes_first_and_ids_may_be_numbers(tmp_path):
    tree = worlds.spot_tree(tmp_path / "spot", {"train": [("1", ["raw"])], "test": [("3", ["raw"])]})
    worlds.spot_tree(tree, {"train": [(1, ["again"]), ("1", ["merged"])]}, prefix="reformat_")
    assert short(load_records(tree)) == {
        "train": [("1.png", "1.png", "1_2.png", ("again", "merged"))],
        "val": [],
        "test": [("3.png", "3.png", "3_2.png", ("raw",))],
    }


def test_folders_of_images(tmp_path):
    tree = worlds.spot_tree(tmp_path / "spot", {"test": [("3", ["one"])]})
    moved = (tree / "resized_images").rename(tmp_path / "images")
    assert load_records(tree)["test"][0].after == moved / "3_2.png", "a sibling"
    moved.rename(tmp_path / "elsewhere")
    refuse(r"3.png: image is missing, but .*test.json: \[0\], field 'img_id' names it; .* --images", tree)
    assert load_records(tree, images=tmp_path / "elsewhere")["test"][0].before == tmp_path / "elsewhere" / "3.png"
    refuse("no such folder of images; correct --images", tree, images=tmp_path / "nowhere")
    for file in (tmp_path / "elsewhere").iterdir():
        file.rename(tree / file.name)
    assert load_records(tree)["test"][0].before == tree / "3.png", "the folder of the annotations itself"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {"76": t}, "train.json: must be a list of objects, got a dict"),
        (lambda t: [*t, "x"], r"train.json: \[4\] must be an object with img_id, sentences, got a str"),
        (lambda t: [t[0], {"img_id": "9"}], r"train.json: \[1\] has no field 'sentences'"),
        (with_entry(1, img_id=None), r"train.json: \[1\], field 'img_id' is None"),
        (with_entry(1, sentences="text"), r"train.json: \[1\], field 'sentences' must be a non-empty list of sentences, got a str"),
        (with_entry(1, sentences=[]), r"\[1\], field 'sentences' must be a non-empty list of sentences, got an empty list"),
        (with_entry(1, sentences=["a", 3]), r"\[1\], field 'sentences'\[1\] must be a sentence, got 3"),
        (with_entry(1, img_id="99"), r"99.png: image is missing, but .*train.json: \[1\], field 'img_id' names it"),
        (
            with_entry(1, img_id="31"),
            r"val.json: \[0\] has the id '31.png' in val, which stands already in .*train.json: \[1\] \(train\); keep it in one",
        ),
    ],
)
def test_wrong_spot(tmp_path, change, sentence):
    tree = worlds.spot_tree(tmp_path / "spot", SPOT)
    edit(tree / "train.json", change)
    refuse(sentence, tree, "spot")


@pytest.mark.parametrize("folder", ["", "dataset/adobe", "adobe", "data"])
def test_ier_reads(tmp_path, folder):
    assert short(load_records(worlds.ier_tree(tmp_path / "ier", IER, folder))) == {
        "train": [("Z_2", "a.jpg", "b.png", ("make it dark",)), ("Z_3", "a.jpg", "c.gif", ("crop it", "cut"))],
        "val": [("R_1", "d.JPG", "e.jpeg", ("brighter",))],
        "test": [("R_2", "d.JPG", "f.jpg", ("remove him",))],
    }


def test_ier_takes_another_extension_if_it_is_the_only_one(tmp_path):
    tree = worlds.ier_tree(tmp_path / "ier", IER)
    (tree / "images" / "d.JPG").rename(tree / "images" / "d.jpg")
    (tree / "images" / "c.gif").rename(tree / "images" / "c.png")
    records = load_records(tree)
    assert records["test"][0].before.name == "d.jpg"
    assert records["train"][1].after.name == "c.png"
    worlds.noise_image(tree / "images" / "c.jpg")
    refuse(r"train.json: \[1\], field 'img1' may mean either: both c.jpg and c.png lie in .*images; keep one", tree)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_entry(1, uid=""), r"train.json: \[1\], field 'uid' is ''"),
        (with_entry(1, uid="Z_2"), r"train.json: \[1\] has the id 'Z_2' in train, which stands already in .*train.json: \[0\]"),
        (with_entry(0, uid="R_2"), r"test.json: \[0\] has the id 'R_2' in test, which stands already in .*train.json: \[0\] \(train\)"),
        (with_entry(1, img1=4), r"train.json: \[1\], field 'img1' is 4; the name of an image file"),
        (with_entry(1, img0="g.jpg"), r"images/g.jpg: image is missing, but .*train.json: \[1\], field 'img0' names it"),
        (with_entry(1, sents="text"), r"train.json: \[1\], field 'sents' must be a non-empty list"),
        (lambda t: [{"img0": "a.jpg"}], r"train.json: \[0\] has no field 'img1'; it needs img0, img1, sents, uid"),
    ],
)
def test_wrong_ier(tmp_path, change, sentence):
    tree = worlds.ier_tree(tmp_path / "ier", IER)
    edit(tree / "train.json", change)
    refuse(sentence, tree)


def test_ier_with_both_names_of_a_split(tmp_path):
    tree = worlds.ier_tree(tmp_path / "ier", IER)
    (tree / "val.json").write_text((tree / "valid.json").read_text())
    refuse("has both valid.json and val.json; keep the one", tree)


def test_birds_reads(tmp_path):
    tree = worlds.birds_tree(tmp_path / "birds", BIRDS)
    (tree / "images" / "12.jpg").rename(tree / "images" / "12.jpeg")
    records = load_records(tree)
    assert short(records) == {
        "train": [("647514-5595152", "647514.jpg", "5595152.jpg", (BIRDS[0][3], BIRDS[2][3]))],
        "val": [("11-12", "11.jpg", "12.jpeg", ('It has a "cap".',))],
        "test": [("13-12", "13.jpg", "12.jpeg", ("Same.",))],
    }
    assert load_records(tree / "birds-to-words-v1.0.tsv") == records, "the file itself"
    assert load_records(tree, "birds") == records


def test_names_of_photographs():
    assert birds.image_name("https://static.inaturalist.org/photos/647514/large.jpg?1413324") == "647514"
    assert birds.image_name("https://example.org/pictures/great%20tit.jpeg?size=9") == "great tit"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("\tval\t", "\tdev\t", r"tsv: line 3, field 'split' is 'dev'; one of train, val"),
        ("\tval\t1", "\tval", r"tsv: line 3 has 10 cells, but line 1 names 11 fields"),
        ("photos/11/large.jpg?141", "", r"tsv: line 3, field 'img1ImgURL' is 'https://static.inaturalist.org/'; the URL of a photograph"),
        ("photos/11/", "photos/77/", r"images/77.jpg: image is missing, but .*tsv: line 3, field 'img1ImgURL' names it; save .*--images"),
        ("annN", "annotation", r"tsv: line 1 names .*; the columns of Birds-to-Words are img1ObservationURL"),
    ],
)
def test_wrong_birds(tmp_path, old, new, sentence):
    tree = worlds.birds_tree(tmp_path / "birds", BIRDS)
    path = tree / "birds-to-words-v1.0.tsv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    refuse(sentence, tree)


def test_birds_pair_in_two_splits_or_two_tables(tmp_path):
    tree = worlds.birds_tree(tmp_path / "birds", [*BIRDS, ("11", "12", "test", "again")])
    refuse(r"line 6 has the id '11-12' in test, which stands already in .*tsv: line 3 \(val\)", tree)
    (tree / "copy.tsv").write_text((tree / "birds-to-words-v1.0.tsv").read_text())
    refuse("found birds-to-words-v1.0.tsv, copy.tsv; name the file itself", tree)


def counts(annotations):
    return {split: (len(entries), sum(len(e.captions) for e in entries)) for split, entries in annotations.items()}


def test_published_counts_of_spot():
    """The released annotation files through the function that `load_records` uses; no image is at hand."""
    folder = golden.annotation_files() / "spot_the_diff"
    raw = {split: len(json.loads((folder / f"{split}.json").read_text())) for split in ("train", "val", "test")}
    assert raw == {"train": 9524, "val": 1634, "test": 1404}
    parsed, said = spot.annotations(folder), []
    assert counts(parsed) == {"train": (8566, 17676), "val": (1493, 3310), "test": (1270, 2107)}
    kept = apply_empty("spot", parsed, "keep", None)
    assert kept == parsed
    dropped = apply_empty("spot", parsed, "drop", said.append)
    assert counts(dropped) == {"train": (8566 - 37, 17676 - 53), "val": (1493 - 4, 3310 - 6), "test": (1270 - 7, 2107 - 7)}
    assert [s.split(" of ")[0] for s in said] == [f"spot: {n} empty sentences" for n in (53, 6, 7)]


def test_published_counts_of_ier():
    parsed = ier.annotations(golden.annotation_files() / "image_editing_request")
    assert counts(parsed) == {"train": (3061, 3061), "val": (383, 1149), "test": (495, 1485)}, "5,695 sentences"
    suffixes = {name.rpartition(".")[2] for entries in parsed.values() for e in entries for name in e.names.values()}
    assert suffixes == {"jpg", "JPG", "jpeg", "png", "gif"}


def test_published_counts_of_clevr():
    folder = golden.annotation_files() / "clevr_change"
    splits, kinds = clevr.splits(folder / "splits.json"), clevr.types(folder / "type_mapping.json")
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 33830, "val": 1988, "test": 3985}
    test = [kinds[f"{number:06d}.png"] for number in splits["test"]]
    assert {kind: test.count(kind) for kind in set(test)} == dict.fromkeys(("color", "material", "add", "drop", "move"), 797)


def test_images_of_every_mode_decode_as_convert_rgb(tmp_path):
    """GIF (first frame), palette, CMYK, 16 bit, transparency; an orientation tag is left alone, as officially."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise.save(tmp_path / "moves.gif", save_all=True, append_images=[noise.rotate(90)])
    noise.convert("P").save(tmp_path / "palette.png", transparency=0)
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.convert("RGBA").save(tmp_path / "alpha.png")
    noise.convert("LA").save(tmp_path / "grey_alpha.png")
    noise.convert("1").save(tmp_path / "bits.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    noise.save(tmp_path / "turned.jpg", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        check_file(path)
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(decode(path, 8), expected, err_msg=path.name)
        assert decode(path, 8).dtype == np.uint8
