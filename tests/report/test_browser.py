"""The page in a real browser: what is on it, what its filters leave, by keyboard, in the dark, on paper and without scripts."""

import io
import time

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")
pytest.importorskip("pycocoevalcap", reason="caption scores need pycocoevalcap: install it")

from browser import Browser, find_browser
from PIL import Image
from report_runs import CAPTIONS, RIGHT, TEST, data_folder, run_folder

from fastidc.report import write_run_report

pytestmark = pytest.mark.slow

SHOWN = "[...document.querySelectorAll('.pair')].filter(c => c.checkVisibility()).map(c => c.querySelector('h3').firstChild.data.trim())"
DECODED = """Promise.all([...document.images].map(async image => {
  image.loading = "eager";
  await image.decode();
  return [image.naturalWidth, image.naturalHeight, image.width];
}))"""
PLOTS = "[...document.querySelectorAll('svg.chart')].map(s => { const b = s.getBoundingClientRect(); return [b.width, b.height]; })"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    data = data_folder(root / "data")
    found = {}
    for stage in ("finetune", "adapt"):
        found[stage] = write_run_report(run_folder(root / stage, data, stage), root / f"{stage}.html", device="cpu", resamples=20)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium on PATH: install one (apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    found.window(1280, 900)
    yield found
    found.close()


@pytest.fixture
def page(browser, pages):
    """A function that opens the fine-tuned run's page, and then has nothing to complain of."""
    browser.media()

    def opened(hash_: str = "") -> Browser:
        browser.open(pages["finetune"], hash_)
        return browser

    yield opened
    assert browser.errors == []


def wanted(**conditions) -> list[str]:
    """Ids in the order of the page."""
    kinds = {"color": range(3, 6), "move": range(6, 9), "add": range(9, 11)}
    return [
        name
        for name in CAPTIONS
        if ("type" not in conditions or (int(name[:6]) in kinds.get(conditions["type"], ()) and not name.endswith("_n")))
        and ("right" not in conditions or (name in RIGHT) == conditions["right"])
    ]


@pytest.mark.parametrize("stage", ["finetune", "adapt"])
def test_it_loads_by_itself_and_all_of_it_is_there(stage, browser, pages):
    browser.open(pages[stage])
    sizes = browser.run(DECODED)
    assert len(sizes) == (3 * len(CAPTIONS) if stage == "finetune" else 3 * len(TEST) + 5 * len(TEST))
    assert all(min(size) > 0 for size in sizes)
    plots = browser.run(PLOTS)
    assert len(plots) == 4
    assert all(width > 200 and height > 100 for width, height in plots)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    assert browser.errors == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [pages[stage].as_uri()]


def test_the_browser_would_have_told(browser, tmp_path):
    """What the other tests rest on: errors, violations of a policy and requests are seen."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('no'); nothing.here()</script><img src='http://127.0.0.1:9/x.png'>")
    browser.open(bad)
    time.sleep(0.2)
    browser.run("1")
    assert len(browser.errors) >= 2
    assert "http://127.0.0.1:9/x.png" in browser.requests


def test_filters_by_address(page):
    cases = {
        "": wanted(),
        "#type=color": wanted(type="color"),
        "#right=no": wanted(right=False),
        "#right=yes": wanted(right=True),
        "#type=color&right=no": wanted(type="color", right=False),
        "#type=no+change&right=no": ["000010.png_n"],
        "#text=ALERT": ["000006.png"],
        "#text=zebra": ["000010.png_n"],
        "#text=cube+script": ["000006.png"],
        "#text=000007.png_n": ["000007.png_n"],
        "#text=no+such+words": [],
        "#type=nonsense": wanted(),
    }
    for hash_, expected in cases.items():
        browser = page(hash_)
        assert browser.run(SHOWN) == expected, hash_
        assert browser.run("document.querySelector('output').value") == f"{len(expected)} of {len(CAPTIONS)} shown"
    assert browser.run("document.forms[0].checkVisibility()")


def test_scores_and_order_by_address(page):
    scores = "Object.fromEntries([...document.querySelectorAll('.pair')].map(c => [c.querySelector('h3').firstChild.data.trim(), +c.dataset.score]))"
    known = page("").run(scores)
    middle = sorted(known.values())[len(known) // 2]
    assert set(page(f"#min={middle}").run(SHOWN)) == {name for name, score in known.items() if score >= middle}
    assert set(page(f"#max={middle}").run(SHOWN)) == {name for name, score in known.items() if score <= middle}
    values = [known[name] for name in page("#order=-score").run(SHOWN)]
    assert values == sorted(known.values(), reverse=True)
    assert page("#order=p").run(SHOWN) == [name for name in CAPTIONS if name.endswith("_n")] + [n for n in CAPTIONS if not n.endswith("_n")]


def test_filters_by_keyboard(page):
    browser = page("")
    browser.run("document.querySelector('[name=text]').focus()")
    for letter in "zebra":
        browser.press(letter, text=letter)
    assert browser.run(SHOWN) == ["000010.png_n"]
    assert browser.run("location.hash") == "#text=zebra"
    browser.press("Enter")
    assert browser.run(SHOWN) == ["000010.png_n"], "no form is sent"
    seen = []
    for _ in range(8):
        browser.press("Tab")
        seen.append(browser.run("document.activeElement.name || document.activeElement.type || document.activeElement.tagName"))
    assert "reset" in seen
    browser.run("document.querySelector('[type=reset]').focus()")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none", "one sees where one is"
    browser.press("Enter", text="\r")
    time.sleep(0.1)
    assert browser.run(SHOWN) == wanted()


def test_a_link_of_a_query_leads_to_its_pair(browser, pages):
    browser.media()
    browser.open(pages["adapt"], "#text=no+such+words")
    assert browser.run(SHOWN) == []
    place = browser.run("(() => { const a = document.querySelector('.query a'); a.click(); return a.hash; })()")
    time.sleep(0.2)
    assert browser.run("location.hash") == place
    assert browser.run(f"document.querySelector('{place}').checkVisibility()")
    assert browser.run(f"Math.abs(document.querySelector('{place}').getBoundingClientRect().top) < innerHeight")
    assert browser.errors == []


def brightness(browser, path) -> float:
    shot = Image.open(io.BytesIO(browser.screenshot(path).read_bytes())).convert("L")
    return sum(shot.histogram()[v] * v for v in range(256)) / (shot.width * shot.height)


def test_light_dark_and_print(page, tmp_path):
    browser = page("")
    colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    browser.media(prefers_color_scheme="light")
    light = browser.run(colours)
    assert brightness(browser, tmp_path / "light.png") > 180
    browser.media(prefers_color_scheme="dark")
    dark = browser.run(colours)
    assert brightness(browser, tmp_path / "dark.png") < 90
    assert light[1] == "rgb(255, 255, 255)"
    assert dark[1] == "rgb(21, 24, 27)"
    assert dark[0] != light[0]
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("document.forms[0].checkVisibility()") is False
    assert browser.run(SHOWN) == wanted()
    assert browser.run(colours)[1] == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="")
    assert len(browser.call("Page.printToPDF")["data"]) > 20_000


def test_a_narrow_window_holds_it(page):
    browser = page("")
    browser.window(360, 800)
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 360
    finally:
        browser.window(1280, 900)


def test_without_scripts_everything_shows(page):
    browser = page("#right=no")
    assert sum(browser.drawn("article.pair")) == len(wanted(right=False))
    browser.reload_without_scripts()
    try:
        assert browser.drawn("article.pair") == [True] * len(CAPTIONS)
        assert browser.drawn("article.pair img") == [True] * 3 * len(CAPTIONS)
        assert browser.drawn("form") == [False]
    finally:
        browser.with_scripts()
