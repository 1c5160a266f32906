"""The page: nothing that a user wrote is markup, nothing is loaded, and its pictures stay within their bounds."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastidc.errors import FastidcError
from fastidc.report import Card, Cell, Hit, Page, Query, Table, Thumbnail, render, write_page
from fastidc.report.curves import Line, chart, charts, read_rows
from fastidc.report.thumbnails import PAGE_BYTES, budget, mosaic, read_picture, thumbnail

HOSTILE = "\"'><b id=hostile onclick=alert(1)>{{ 7 * 7 }}</b></script><img src=x>&"
DOT = Thumbnail("data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==", 1, 1)


class Seen(HTMLParser):
    """Tags, texts and attributes as a browser has them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)


def full_page(text: str) -> Page:
    """A page in which every text that can come from outside is ``text``."""
    card = Card(text, DOT, DOT, [text, text], text, text, 0.25, 31.25, False, DOT)
    return Page(
        text,
        [text],
        [(text, text)],
        [chart(text, [Line(text, [1, 2], [1, 2]), Line(text, [1, 2], [2, 1])], axis=text)],
        Table([text, text], [(text, [Cell(text, text)])], [text]),
        [text],
        [(text, text)],
        [Query(text, 1, [Hit(0, text, 0.5, True, DOT)])],
        text,
        [card, Card("plain", DOT, DOT, [])],
        text,
        [text],
    )


def test_nothing_that_a_user_wrote_is_markup():
    plain, hostile = Seen(render(full_page("word"))), Seen(render(full_page(HOSTILE)))
    assert hostile.tags == plain.tags
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert sum(HOSTILE in text for text in hostile.texts) >= 20, "and it is all to be read as it was written"
    values = [value for _, _, value in hostile.attributes if value and "hostile" in value]
    assert len(values) > 5, "alt texts, labels and data of cards"
    assert all(HOSTILE in value for value in values)


def test_the_page_loads_nothing_and_its_policy_says_so():
    text = render(full_page("word"))
    seen = Seen(text)
    assert not {"link", "iframe", "object", "base", "embed"} & set(seen.tags)
    loads = [value for _, name, value in seen.attributes if name in ("src", "href", "srcset", "action", "data", "xlink:href")]
    assert all(value.startswith(("data:image/", "#pair-")) for value in loads)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    policy = next(value for tag, name, value in seen.attributes if tag == "meta" and name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert text.count("<script") == 1
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]


def test_without_scripts_everything_is_there_and_no_control_that_does_nothing():
    seen = Seen(render(full_page("word")))
    assert ("form", "hidden", None) in seen.attributes
    assert not [tag for tag, name, _ in seen.attributes if name == "hidden" and tag != "form"]
    assert not {"template", "noscript"} & set(seen.tags)
    images = [value for tag, name, value in seen.attributes if (tag, name) == ("img", "loading")]
    assert images == ["lazy"] * 6
    assert sum((tag, name, value) == ("img", "decoding", "async") for tag, name, value in seen.attributes) == 6


def test_what_is_empty_is_left_out(tmp_path):
    path = write_page(tmp_path / "sub" / "report.html", Page("nothing yet"))
    text = path.read_text()
    assert "0 pairs shown" in text
    for absent in ("Learning curves", "Retrieval", "Scores", "<script", "<form"):
        assert absent not in text
    (tmp_path / "file").write_text("")
    with pytest.raises(FastidcError, match="cannot be written"):
        write_page(tmp_path / "file" / "report.html", Page("t"))


@pytest.mark.parametrize("count", [1, 40, 400, 4000])
def test_pictures_of_any_number_of_pairs_stay_below_the_bound(count):
    most = budget(3 * count)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for kind in ("JPEG", "WEBP"):
        small = thumbnail(noise, most, kind=kind)
        data = base64.b64decode(small.uri.partition(",")[2])
        assert len(data) <= most, "noise is the worst that can come"
        assert 3 * count * len(small.uri) <= PAGE_BYTES + 3 * count * 30 < 20_000_000
        opened = Image.open(io.BytesIO(data))
        assert opened.format == kind
        assert opened.size == (small.width, small.height)
        assert abs(small.width / small.height - 4 / 3) < 0.05


def test_a_picture_that_fits_keeps_its_size(tmp_path):
    Image.new("RGBA", (480, 320), (40, 90, 160, 128)).save(tmp_path / "a.png")
    Image.new("L", (90, 160), 200).save(tmp_path / "b.png")
    large, tall = (thumbnail(read_picture(tmp_path / name, "p", "before"), budget(1)) for name in ("a.png", "b.png"))
    assert ((large.width, large.height), (tall.width, tall.height)) == ((400, 267), (90, 160))
    assert large.uri.startswith("data:image/jpeg;base64,")
    pixel = Image.open(io.BytesIO(base64.b64decode(large.uri.partition(",")[2]))).getpixel((200, 100))
    assert max(abs(a - b) for a, b in zip(pixel, (40, 90, 160), strict=True)) <= 3
    red, blue = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    tiles = mosaic([[red, blue], [blue, red]], 60, 40)
    assert tiles.size == (60, 40)
    assert [tiles.getpixel(at) for at in ((10, 10), (50, 10), (10, 30), (50, 30))] == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]


def test_a_bad_image_is_named(tmp_path):
    (tmp_path / "0.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(FastidcError, match=r"0\.png: cannot be read as an image .* It is the before image of pair 'x'\."):
        read_picture(tmp_path / "0.png", "x", "before")


def points(svg: str, kind: str) -> np.ndarray:
    (found,) = re.findall(rf'<polyline class="{kind}" points="([^"]*)"', svg)
    return np.array([[float(v) for v in point.split(",")] for point in found.split()])


def test_a_chart_shows_the_numbers():
    plain = points(chart("t", [Line("a", range(1, 6), [10.0, 8, 6, 4, 2])]).svg, "line c0")
    assert (np.diff(plain[:, 0]) > 0).all()
    assert (np.diff(plain[:, 1]) > 0).all(), "down is more"
    assert np.allclose(np.diff(plain[:, 1], 2), 0, atol=0.11)
    log = points(chart("t", [Line("a", range(4), [1000.0, 100, 10, 1])], log=True).svg, "line c0")
    assert np.allclose(np.diff(log[:, 1], 2), 0, atol=0.11), "even steps"
    for values in ([5.0], [0.0, 0.0], [-1.0, -1.0], [1e-9, 2e-9], [1e9, 3e9]):
        svg = chart("t", [Line("a", list(range(len(values))), values)]).svg
        assert all(0 <= float(v) <= 420 for v in re.findall(r'(?:cx|cy|x|y)="([-\d.]+)"', svg))


def test_curves_of_a_run(tmp_path):
    rows = [{"step": i, "lr": [0.5, 0.5], "loss": 100.0 / i, "grad_norm": None if i == 3 else 1.0, "seconds": i} for i in range(1, 1001)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 1001, "lo')
    found = {
        one.title: one.svg
        for one in charts(read_rows(tmp_path / "log.jsonl"), tmp_path, {"epoch": 2, "score": 0.5, "criterion": "CIDEr", "split": "val"})
    }
    assert list(found) == ["loss", "learning rate", "gradient norm", "val CIDEr, epoch 3, which was kept"]
    assert len(points(found["loss"], "faint")) == 240
    assert found["learning rate"].count("<polyline") == 1, "groups of one rate are one line"
    (tmp_path / "scores.jsonl").write_text(
        "".join(json.dumps({"epoch": i, "score": i / 10, "criterion": "CIDEr"}) + "\n" for i in range(4))
    )
    last = charts(read_rows(tmp_path / "log.jsonl"), tmp_path, {"epoch": 2, "score": 0.2})[-1]
    assert last.title == "val CIDEr"
    assert last.svg.count("<circle") == 5
    assert "kept: epoch 3" in last.svg
    (tmp_path / "log.jsonl").write_text("[1]\n" + text)
    with pytest.raises(FastidcError, match=r"log\.jsonl: line 1 is no JSON object"):
        read_rows(tmp_path / "log.jsonl")
    assert read_rows(tmp_path / "none.jsonl") == []
