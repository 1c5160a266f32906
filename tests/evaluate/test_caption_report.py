import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from fastidc.errors import FastidcError
from fastidc.evaluate.report import ReportPair, format_table, write_report

SCORES = {
    "BLEU-1": 0.5,
    "BLEU-2": 0.4,
    "BLEU-3": 0.3,
    "BLEU-4": 0.2,
    "METEOR": None,
    "ROUGE-L": 0.71234,
    "CIDEr": 1.50755,
    "pairs": 7970,
    "tokenizer": "ptb-regex",
    "METEOR_reason": "there is no java",
    "tokenizer_reason": "there is no java",
}
METRICS = {"overall": SCORES, "change": SCORES, "no_change": SCORES, "types": {"color": SCORES, "move": SCORES}, "change accuracy": 0.98765}


class Page(HTMLParser):
    """What a browser sees: the texts, the images, and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.images, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action", "data")]
        assert tag not in ("script", "link", "iframe", "object", "base")
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def pairs(tmp_path):
    for number in range(3):
        Image.new("RGBA", (480, 320), (40 * number, 90, 160, 128)).save(tmp_path / f"{number}.png")
        Image.new("L", (1600, 900), 200).save(tmp_path / f"{number}_after.jpg")
    captions = ["the cube moved", '<script>alert("x")</script> & co', "no change was made"]
    return [
        ReportPair(
            id=f"{number:06d}.png",
            before=tmp_path / f"{number}.png",
            after=tmp_path / f"{number}_after.jpg",
            references=[f"reference {number} a", f"reference <i>{number}</i> b"],
            caption=captions[number],
            type="move",
            correct=[True, False, None][number],
        )
        for number in range(3)
    ]


def test_the_page_has_every_pair_and_needs_nothing_else(tmp_path, pairs):
    text = write_report(
        tmp_path / "out" / "report.html",
        pairs=pairs,
        metrics=METRICS,
        title="Test <run>",
        notes=["model & data"],
        constant=("there is no change", {"overall": SCORES}),
    ).read_text(encoding="utf-8")
    page = Page(text)
    seen = " ".join(page.texts)
    for pair in pairs:
        assert pair.id in seen
        assert pair.caption in seen
        assert all(reference in seen for reference in pair.references)
    assert "Test <run>" in seen
    assert "model & data" in seen
    assert "1 of 2 judged right" in seen
    assert "METEOR -: there is no java" in seen
    assert "0.9877" in seen
    assert len(page.images) == 6
    assert all(image["alt"].startswith("Pair 00000") for image in page.images)
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.loads)
    assert "<script" not in text
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "url(" not in text
    assert "@import" not in text


def test_images_are_small_and_keep_their_shape(tmp_path, pairs):
    page = Page(write_report(tmp_path / "report.html", pairs=pairs, metrics={}, title="t").read_text(encoding="utf-8"))
    sizes = [Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size for image in page.images]
    assert sizes == [(480, 320), (640, 360)] * 3


def test_a_page_without_pairs_or_scores_is_a_page(tmp_path):
    assert "0 pairs shown" in write_report(tmp_path / "report.html", pairs=[], metrics={}, title="t").read_text(encoding="utf-8")


def test_a_bad_image_is_named(tmp_path, pairs):
    (tmp_path / "0.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(FastidcError, match=r"0\.png: the before image of pair '000000.png' cannot be read"):
        write_report(tmp_path / "report.html", pairs=pairs, metrics={}, title="t")
    assert not (tmp_path / "report.html").exists()


def test_the_table_is_aligned_and_says_what_is_missing():
    lines = format_table(METRICS, constant=("there is no change", {"overall": SCORES, "types": {"move": SCORES}})).splitlines()
    table = lines[:7]
    assert len({len(line) for line in table}) == 1
    assert [line.split("  ")[0].strip() or line.split()[0] for line in table[2:]] == ["overall", "change", "no change", "color", "move"]
    assert table[0].split()[-9:] == ["pairs", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "constant"]
    assert table[2].split()[1:] == ["7970", "50.00", "40.00", "30.00", "20.00", "-", "71.23", "150.75", "150.75"]
    assert table[3].split()[-1] == "-"
    assert max(map(len, table)) <= 100
    text = "\n".join(lines[7:])
    assert "change accuracy  0.9877" in text
    assert "METEOR -: there is no java" in text
    assert text.count("there is no java") == 2
    assert '"there is no change"' in text


def test_one_set_of_scores_makes_a_table_of_one_row():
    lines = format_table(SCORES).splitlines()
    assert lines[2].split()[:2] == ["overall", "7970"]
    assert "METEOR -" in lines[-2]
    assert format_table({"change accuracy": 0.5}) == "change accuracy  0.5000"
