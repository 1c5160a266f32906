import json

import pytest

from fastidc.errors import FastidcError
from fastidc.evaluate.coco import read_references, read_results, write_references, write_results


def test_references_have_the_official_form(tmp_path):
    references = {"000001.png": ["the cube moved", "caf\u00e9 \u2028 moved"], "000001.png_n": ["no change was made"]}
    path = write_references(tmp_path / "new" / "gt.json", references)
    content = json.loads(path.read_text())
    assert list(content) == ["info", "licenses", "type", "images", "annotations"]
    assert content["type"] == "captions"
    assert content["images"][1] == {"filename": "000001.png_n", "id": "000001.png_n"}
    assert content["annotations"][2] == {"caption": "no change was made", "id": 2, "image_id": "000001.png_n"}
    assert read_references(path) == references


def test_results_have_the_official_form(tmp_path):
    captions = {"b.png": "x", "a.png": ""}
    path = write_results(tmp_path / "hyp.json", captions)
    assert json.loads(path.read_text()) == [{"image_id": "b.png", "caption": "x"}, {"image_id": "a.png", "caption": ""}]
    assert read_results(path) == captions


def test_pycocotools_reads_both(tmp_path):
    coco_module = pytest.importorskip("pycocotools.coco", reason="install pycocotools, which pycocoevalcap brings along")
    references = {"1.png": ["a", "b"], "1.png_n": ["c"]}
    coco = coco_module.COCO(write_references(tmp_path / "gt.json", references))
    results = coco.loadRes(str(write_results(tmp_path / "hyp.json", {"1.png": "x", "1.png_n": "y"})))
    assert set(results.getImgIds()) == set(references)
    assert [entry["caption"] for entry in coco.imgToAnns["1.png"]] == ["a", "b"]


def test_a_sentence_that_stands_twice_counts_twice(tmp_path):
    """Frequencies of documents do not change by it, but a pair's mean over its references does, as in pycocoevalcap."""
    annotations = [{"image_id": "1", "caption": text, "id": i} for i, text in enumerate(["a", "b", "a"])]
    (tmp_path / "gt.json").write_text(json.dumps({"images": [{"id": "1"}], "annotations": annotations}))
    assert read_references(tmp_path / "gt.json") == {"1": ["a", "b", "a"]}


def test_a_byte_order_mark_and_repeated_images_are_read(tmp_path):
    path = tmp_path / "gt.json"
    content = {"images": [{"id": 7}, {"id": 7}], "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}]}
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert read_references(path) == {"7": ["a", "b"]}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_results, b"{", "not valid JSON .line 1, column 2"),
        (read_results, b"[" * 100_000, "nested too deeply"),
        (read_results, b'["\xff"]', "byte 2 is not UTF-8"),
        (read_results, b"{}", "not an object"),
        (read_results, b"[3]", r"\[0\] is a number"),
        (read_results, b'[{"image_id": "a"}]', r"\[0\].caption is missing"),
        (read_results, b'[{"image_id": "a", "caption": 3}]', r"\[0\].caption is a number"),
        (read_results, b'[{"image_id": true, "caption": "x"}]', r"\[0\].image_id is a truth value"),
        (read_results, b'[{"image_id": "a", "caption": "x"}, {"image_id": "a", "caption": "y"}]', r"\[1\].image_id 'a' occurs twice"),
        (read_references, b"[]", "an object with a list `annotations`"),
        (read_references, b'{"annotations": [{"image_id": "a", "caption": ["x"]}]}', r"annotations\[0\].caption is a list"),
    ],
)
def test_a_bad_file_is_named(tmp_path, read, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(FastidcError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_bad_value_are_named(tmp_path):
    with pytest.raises(FastidcError, match=r"none\.json cannot be read"):
        read_results(tmp_path / "none.json")
    with pytest.raises(FastidcError, match="caption of 'a' is int"):
        write_results(tmp_path / "x.json", {"a": 3})
    with pytest.raises(FastidcError, match="references of 'a'"):
        write_references(tmp_path / "x.json", {"a": "one sentence"})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_results(tmp_path / "hyp.json", {"a": "old"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(FastidcError, match="No space left on device"):
        write_results(path, {"a": "new"})
    assert read_results(path) == {"a": "old"}
    assert [file.name for file in tmp_path.iterdir()] == ["hyp.json"]
