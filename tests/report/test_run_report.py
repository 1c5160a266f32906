"""`fastidc report`: what a run folder holds is on its page, and what it lacks is said."""

import json
import re
import shutil
from collections import Counter
from html import unescape

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")
pytest.importorskip("pycocoevalcap", reason="caption scores need pycocoevalcap: install it")

from report_runs import CAPTIONS, HOSTILE, RIGHT, TEST, data_folder, run_folder

from fastidc.cli import main
from fastidc.describe import attention_maps
from fastidc.report import gallery, write_run_report

pytestmark = pytest.mark.usefixtures("no_java")  # METEOR has tests of its own, and takes a second to start

QUICK = {"device": "cpu", "resamples": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_folder(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, data):
    return run_folder(tmp_path_factory.mktemp("runs") / "finetune", data, "finetune")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, data):
    return run_folder(tmp_path_factory.mktemp("runs") / "adapt", data, "adapt")


def cards(text: str) -> dict[str, dict[str, str]]:
    """id -> attributes of its card, with what it says."""
    found = {}
    for head, body in re.findall(r'<article class="pair"([^>]*)>(.*?)</article>', text, re.DOTALL):
        facts = dict(re.findall(r'data-(\w+)="([^"]*)"', head))
        name = re.search(r"<h3>(\S+)", body)[1].removesuffix("</h3>")
        caption = re.search(r'<p class="caption">(.*?)</p>', body, re.DOTALL)
        found[name] = facts | {"caption": unescape(caption[1]) if caption else None, "images": body.count("<img"), "body": body}
    return found


def test_a_fine_tuned_run(tuned, data, tmp_path, capsys):
    assert main(["report", str(tuned), "--out", str(tmp_path / "page.html"), "--device", "cpu", "--resamples", "20"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"wrote {tmp_path / 'page.html'} (")
    text = (tmp_path / "page.html").read_text()
    found = cards(text)
    assert set(found) == set(CAPTIONS)
    assert {name: one["caption"] for name, one in found.items()} == CAPTIONS
    assert [name for name, one in found.items() if one["right"] == "yes"] == RIGHT
    assert {one["right"] for one in found.values()} == {"yes", "no"}
    kinds = {"000003.png": "color", "000006.png": "move", "000009.png": "add", "000003.png_n": "no change"}
    assert {name: found[name]["type"] for name in kinds} == kinds
    assert all(one["images"] == 3 for one in found.values()), "before, after, map"
    assert {one["p"][:5] for name, one in found.items() if name.endswith("_n")} == {"0.020"}, "0.125, calibrated with the run's scale of 2"
    assert all(one["score"] for one in found.values())
    assert HOSTILE not in text
    assert text.count("<script") == 1
    assert "runs/&lt;b&gt;adapt" in text
    assert len(re.findall(r'<svg class="chart"', text)) == 4
    assert len(re.findall(r"<small>[\d.]+\u2013[\d.]+</small>", text)) >= 6 * 6, "intervals of every metric and kind of pair"
    for said in ("Beside the paper", "150.7", f"{len(RIGHT)} of 16 judged right", "val CIDEr, epoch 3, which was kept", "METEOR -: "):
        assert said in text
    assert not list(tmp_path.glob(".*"))


def test_the_map_is_the_model_s_and_the_pair_s(tuned, data):
    known = gallery.pairs_of(gallery_records(data))
    pair, other = known["000003.png"], known["000003.png_n"]
    from fastidc.describe.loading import load

    ready = load(tuned, "cpu")
    embeddings, maps = gallery._looked([pair, other], ready, True)
    for row, each in enumerate((pair, other)):
        alone = attention_maps(ready, each.before, each.after)
        assert (maps[row].inter_after - alone.inter_after).abs().max() < 1e-6
    assert (maps[0].inter_after - maps[1].inter_after).abs().max() > 1e-4
    bar = Counter()
    bar.update = lambda: Counter.update(bar, ["pair"])
    assert len(list(gallery.pictures([pair, other], ready, maps=True, bar=bar))) == bar["pair"] == 2
    again, none = gallery._looked([pair, other], ready, False)
    assert none is None
    assert (again - embeddings).abs().max() < 1e-5


def gallery_records(data):
    from fastidc.data.records import load_records

    return load_records(data)["test"]


def test_an_adapted_run_shows_what_it_finds(adapted):
    text = write_run_report(adapted, **QUICK).read_text()
    found = cards(text)
    assert set(found) == {f"{number:06d}.png" for number in TEST}, "change pairs, as retrieval is scored"
    assert all((one["caption"], one["right"], one["images"]) == (None, "", 3) for one in found.values())
    asked = re.findall(r'<article class="query">(.*?)</article>', text, re.DOTALL)
    assert len(asked) == len(TEST)
    for one in asked:
        place = int(re.search(r"its pair is number (\d+)", one)[1])
        cosines = [float(v) for v in re.findall(r"<span>(-?\d\.\d{3})", one)]
        assert len(cosines) == 5
        assert cosines == sorted(cosines, reverse=True)
        assert ("its pair</b>" in one) == (place <= 5)
        assert len(re.findall(r'<li class="hit">', one)) == (place <= 5)
    for said in (
        "sentence to pair, strict ties",
        "pair to sentences, legacy ties",
        "46.4",
        "val text-to-pair R@1, epoch 2, which was kept",
    ):
        assert said in text
    assert (adapted / "report.html").is_file()


def test_some_of_the_pairs(tuned, tmp_path):
    text = write_run_report(tuned, tmp_path / "a.html", pairs=5, **QUICK).read_text()
    assert len(cards(text)) == 5
    assert "They are 5 of the 16 of the test split" in text
    assert cards(write_run_report(tuned, tmp_path / "b.html", pairs=5, **QUICK).read_text()).keys() == cards(text).keys(), (
        "the same ones again"
    )
    ids = ["000010.png_n", "000003.png"]
    named = write_run_report(tuned, tmp_path / "c.html", ids=ids, title="<T>", notes=["a note"], others=[("figure", "0.5")], **QUICK)
    assert list(cards(named.read_text())) == ids
    assert "<h1>&lt;T&gt;</h1>" in named.read_text()
    many = [f"{i}.png" for i in range(1000)] + [f"{i}.png_n" for i in range(1000)]
    drawn = gallery.drawn(many, 400)
    assert len(set(drawn)) == 400
    assert drawn == sorted(drawn, key=many.index)
    assert 150 < sum(name.endswith("_n") for name in drawn) < 250
    assert 150 < sum(int(name.split(".")[0]) % 2 for name in drawn) < 250


def test_judgements():
    change, none = (gallery.Pair("a", None, None, (), kind, changed) for kind, changed in (("move", True), (gallery.NO_CHANGE, False)))
    told = {
        "the cube moved": (True, False),
        "the cube turned red": (False, False),
        "nothing has changed": (False, True),
        "zebra": (False, False),
    }
    for caption, expected in told.items():
        assert tuple(gallery.judge(caption, pair, True, True) for pair in (change, none)) == expected
    assert gallery.judge("zebra", change, False, True) is True, "it says that something changed"
    assert gallery.judge("no change", change, False, True) is False
    assert gallery.judge("the cube moved", change, False, False) is None


def test_what_a_run_lacks_is_said(tuned, data, tmp_path, capsys):
    run = shutil.copytree(tuned, tmp_path / "run")
    for name in ("metrics.json", "model.safetensors", "change_test.json", "log.jsonl"):
        (run / name).unlink()
    text = write_run_report(run, **QUICK).read_text()
    assert all(one["images"] == 2 and one["p"] == "" for one in cards(text).values())
    for said in ("no metrics.json: it is still going on", "no model.safetensors yet"):
        assert said in text
    assert "Learning curves" not in text
    assert "p(change)" not in text
    (run / "hyp_test.json").unlink()
    text = write_run_report(run, **QUICK).read_text()
    assert "The run has no captions of the test split" in text
    assert len(cards(text)) == 16
    assert {one["right"] for one in cards(text).values()} == {""}
    intra = run_folder(tmp_path / "intra", data, "finetune", intra_layers=3)
    text = write_run_report(intra, **QUICK).read_text()
    assert "no inter layer, so there are no attention maps" in text
    assert all(one["images"] == 2 for one in cards(text).values())


@pytest.mark.parametrize(
    ("spoil", "argv", "said"),
    [
        (lambda run: None, ["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (lambda run: None, ["--resamples", "-1"], "--resamples must be at least 0"),
        (lambda run: None, ["--data", "/no/such/folder"], "say with --data where they are"),
        (lambda run: None, ["--out", "."], "a folder; --out names a file"),
        (lambda run: (run / "log.jsonl").write_text("{\n{}\n"), [], "log.jsonl: line 1"),
        (lambda run: (run / "metrics.json").write_text("[]"), [], "metrics.json: an object was expected"),
        (lambda run: (run / "change_test.json").write_text('{"000003.png": 2}'), [], "change_test.json: '000003.png' is 2"),
        (lambda run: (run / "config.json").write_text("{}"), [], "config.json"),
        (lambda run: (run / "config.json").unlink(), [], "run"),
    ],
)
def test_what_cannot_be_is_one_sentence(spoil, argv, said, tuned, tmp_path, capsys):
    run = shutil.copytree(tuned, tmp_path / "run")
    spoil(run)
    assert main(["report", str(run), "--device", "cpu", *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastidc:")]
    assert said in lines[-1]
    assert not (run / "report.html").exists()


def test_an_image_that_cannot_be_read_leaves_no_page(tuned, tmp_path, capsys):
    broken = data_folder(tmp_path / "data")
    (broken / "sc_images" / "CLEVR_semantic_000006.png").write_bytes(b"x")
    assert (
        main(["report", str(tuned), "--data", str(broken), "--out", str(tmp_path / "page.html"), "--device", "cpu", "--resamples", "0"])
        == 2
    )
    assert "CLEVR_semantic_000006.png" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_types_of_other_data_are_not_judged(tuned, data, tmp_path):
    """Without CLEVR's types, change or none is judged, as there are pairs of both kinds."""
    other = data_folder(tmp_path / "data")
    (other / "type_mapping.json").write_text(json.dumps({"zoom": [f"{n:06d}.png" for n in range(11)]}))
    text = write_run_report(tuned, tmp_path / "page.html", data=other, **QUICK).read_text()
    found = cards(text)
    assert found["000004.png"]["right"] == "yes", "it moved, or turned: something changed"
    assert found["000005.png"]["right"] == "no"
    assert found["000010.png_n"]["right"] == "no"
    assert "nothing else" in text
