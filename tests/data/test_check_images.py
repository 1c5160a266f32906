"""Bad image files of every kind: the loader's own verdict, and each in its row."""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import check_cases
import numpy as np
import pytest
import worlds
from check_cases import WORLDS, found
from PIL import Image

from fastidc.data.check import check
from fastidc.data.check_images import look, look_at_all
from fastidc.data.images import check_file, decode
from fastidc.data.patience import under_way
from fastidc.data.records import load_records
from fastidc.errors import FastidcError


def encoded(kind: str = "PNG", size=(24, 20), **options) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a header that promises so many pixels and hardly a byte of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :]


PNG, JPEG = encoded(), encoded("JPEG", quality=95)
FILES = {
    "image-empty": [b""],
    "image-foreign": [b"<!DOCTYPE html><title>404</title>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 64, PNG[:8]],
    "image-truncated": [PNG[:-3], PNG[:-12], PNG[: len(PNG) // 2], JPEG[:-40], JPEG[: len(JPEG) // 2]],
    "image-broken": [flipped(PNG)],
    "image-bomb": [bomb(30000, 30000)],
    "image-tiny": [encoded(size=(1, 1)), encoded(size=(30, 1))],
}
GOOD = {
    "gif": encoded("GIF"),
    "webp": encoded("WEBP"),
    "wrong name": JPEG,
    "cmyk": (lambda file: (Image.new("CMYK", (20, 20)).save(file, "JPEG"), file.getvalue())[1])(BytesIO()),
    "grey": (lambda file: (Image.new("L", (20, 20)).save(file, "PNG"), file.getvalue())[1])(BytesIO()),
}


@pytest.mark.parametrize(("kind", "data"), [(kind, data) for kind, files in FILES.items() for data in files])
def test_bad_files(tmp_path, kind, data):
    tree = check_cases.spot(tmp_path / "own")
    (tree / "resized_images" / "9_2.png").write_bytes(data)
    findings = check(tree, progress=False)
    (row,) = [problem for problem in findings.problems if problem.level == "bad"]
    assert (row.kind, row.file, row.place, row.field, row.ids) == (kind, "train.json", "[1]", "img_id", ("9.png",))
    assert row.what.startswith(f"resized_images{os.sep}9_2.png: ")
    assert row.fix
    assert findings.code == 1


@pytest.mark.parametrize("data", [data for files in FILES.values() for data in files] + list(GOOD.values()))
def test_the_verdict_is_the_loaders(tmp_path, data):
    """Of one pixel the loader makes an image, which is the only thing that the check minds and it does not."""
    path = tmp_path / "x.png"
    path.write_bytes(data)
    try:
        check_file(path)
        decode(path, 32)
        refused = False
    except FastidcError:
        refused = True
    seen = look(path)
    assert bool(seen.kind and seen.kind != "image-tiny") is refused
    assert refused or seen.size == Image.open(path).size


def test_what_is_named_and_what_is_hinted(tmp_path):
    (tmp_path / "a.png").write_bytes(FILES["image-foreign"][0])
    assert "a web page" in look(tmp_path / "a.png").what
    (tmp_path / "a.png").write_bytes(FILES["image-foreign"][1])
    assert "git lfs pull" in look(tmp_path / "a.png").what
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.png").mkdir()
    os.mkfifo(tmp_path / "d.png")
    kinds = {path.name: seen.kind for path, seen in look_at_all(sorted(tmp_path.iterdir()), "full", 2, progress=False).items()}
    assert kinds == {"a.png": "image-foreign", "b.png": "image-missing", "c.png": "image-foreign", "d.png": "image-foreign"}


def test_a_plugin_that_fails_is_a_row(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyError("bits")

    monkeypatch.setattr("fastidc.data.check_images.decode", fail)
    path = worlds.noise_image(tmp_path / "x.png")
    assert look(path).kind == "image-broken"
    assert "KeyError: 'bits'" in look(path).what
    assert not look(path, "ends").kind, "the ends decode nothing"


def test_a_quick_look_sees_ends_only(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    (tree / "resized_images" / "9.png").write_bytes(flipped(PNG))
    (tree / "resized_images" / "9_2.png").write_bytes(PNG[:-3])
    assert [row[1] for row in found(tree)] == ["image-broken", "image-truncated"]
    assert [row[1] for row in found(tree, how="ends")] == ["image-truncated"]
    assert found(tree, how="none") == []


@pytest.mark.parametrize("kind", WORLDS)
def test_every_reader_has_its_place_and_field(tmp_path, kind):
    """The last image of a set is damaged, the first is gone."""
    tree = WORLDS[kind](tmp_path / "own")
    findings = check(tree, progress=False)
    assert findings.code == 0
    records = load_records(tree)
    gone, damaged = records["train"][0], records["test"][-1]
    gone.after.unlink()
    damaged.after.write_bytes(damaged.after.read_bytes()[: damaged.after.stat().st_size // 2])
    rows = {problem.kind: problem for problem in check(tree, progress=False).problems if problem.level == "bad"}
    assert set(rows) == {"image-missing", "image-truncated"}
    place, field = {
        "clevr": ("test[1]", "after"),
        "spot": ("[0]", "img_id"),
        "ier": ("[0]", "img1"),
        "birds": ("line 4", "img2ImgURL"),
        "table": ("line 5", "after"),
        "folder": ("'5'", "after"),
    }[kind]
    assert (rows["image-truncated"].place, rows["image-truncated"].field) == (place, field)
    assert rows["image-truncated"].ids == (damaged.id,)
    assert rows["image-missing"].ids == (gone.id,)
    assert gone.after.stem in rows["image-missing"].what


def test_pairs_next_to_each_other(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    images = tree / "resized_images"
    (images / "9_2.png").write_bytes((images / "9.png").read_bytes())
    worlds.noise_image(images / "76_2.png", 99, (300, 20))
    assert found(tree) == [
        ("bad", "pair-same", "train.json", "[1]", ""),
        ("note", "image-long", "train.json", "[0]", "img_id"),
        ("note", "size-differs", "train.json", "[0]", ""),
    ]
    check_cases.edit(tree / "train.json", lambda t: [t[0], t[1] | {"sentences": ["no difference", "they look the same"]}])
    assert "pair-same" not in [row[1] for row in found(tree)], "a pair without a change may be twice the same"


def test_the_two_images_of_a_scene_that_must_differ(tmp_path):
    tree = check_cases.clevr(tmp_path / "own")
    after = tree / "sc_images" / "CLEVR_semantic_000003.png"
    after.write_bytes((tree / "nsc_images" / "CLEVR_nonsemantic_000003.png").read_bytes())
    findings = check(tree, progress=False)
    (row,) = findings.problems
    assert (row.kind, row.place, row.ids) == ("pair-same", "train[0]", ("000003.png",))
    assert "distractor- and after-image" in row.what


def test_an_image_of_several_pairs_is_one_row(tmp_path):
    tree = check_cases.ier(tmp_path / "own")
    (tree / "images" / "a.jpg").write_bytes(b"")
    findings = check(tree, progress=False)
    (row,) = findings.problems
    assert row.ids == ("Z_2", "Z_3")
    assert "(in 2 pairs)" in row.what
    assert set(findings.bad_pairs()) == {"Z_2", "Z_3"}


def test_facts_of_images(tmp_path):
    tree = check_cases.spot(tmp_path / "own")
    Image.new("L", (30, 20)).save(tree / "resized_images" / "8.png")
    facts = check(tree, progress=False).facts["images"]
    assert facts["sizes"] == {"24x20": 7, "30x20": 1}
    assert facts["modes"] == {"RGB": 7, "L": 1}
    assert facts["formats"] == {"PNG": 8}
    assert facts["bytes"] == sum(path.stat().st_size for path in (tree / "resized_images").iterdir())


def test_each_distinct_image_is_looked_at_once_and_few_are_under_way(tmp_path, monkeypatch):
    tree = check_cases.ier(tmp_path / "own")
    looked = []
    monkeypatch.setattr("fastidc.data.check_images.decode", lambda path, size: looked.append(path.name))
    check(tree, workers=3, progress=False)
    assert sorted(looked) == ["a.jpg", "b.png", "c.png", "d.jpg", "e.jpg", "f.jpg", "g.jpg"]
    begun = []

    def items():
        for number in range(1000):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        for number, result in enumerate(under_way(pool, lambda item: item, items(), 16)):
            assert result == number
            assert len(begun) <= number + 17, "no more than 16 ahead"
