"""`fastidc demo`: its files on a small world, and, slowly, what it promises."""

import json
import re

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.demo import run_demo
from fastidc.errors import FastidcError
from fastidc.train.stage import StageRun


def check_files(out, metrics):
    names = {"adapt", "data", "finetune", "hyp_test.json", "metrics.json", "references.json", "report.html"}
    assert {p.name for p in out.iterdir()} == names
    hypotheses = json.loads((out / "hyp_test.json").read_text())
    references = json.loads((out / "references.json").read_text())
    test = json.loads((out / "data" / "splits.json").read_text())["test"]
    expected = {f"{n:06d}.png{suffix}" for n in test for suffix in ("", "_n")}
    assert {h["image_id"] for h in hypotheses} == {i["id"] for i in references["images"]} == expected
    assert len(hypotheses) == 2 * len(test)
    assert all(set(h) == {"image_id", "caption"} for h in hypotheses)
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", page), "the page needs no network"
    assert page.count("data:image/jpeg;base64,") == 2 * min(40, len(test))
    return hypotheses


def test_demo_writes_everything(tmp_path, capsys, no_java):  # METEOR takes most of the time; the run that learns has it
    out = tmp_path / "demo"
    metrics = run_demo(out, steps=(2, 2), scenes=120, width=96, height=64)
    check_files(out, metrics)
    table = capsys.readouterr().out
    for text in ("overall", "no change", "constant", "change/no-change accuracy", "the world: scenes 120"):
        assert text in table
    assert metrics["world"]["config"]["scenes"] == 120
    again = run_demo(out, steps=(2, 2), scenes=120, width=96, height=64)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}, "the same world is used again and the same seed gives the same captions"
    with pytest.raises(FastidcError, match=r"data: holds another world than the demo's"):
        run_demo(out, steps=(2, 2), scenes=121, width=96, height=64)


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(tmp_path, capsys, monkeypatch, no_java):
    """Killed in its second stage: the first one stays, the second goes on where it was, and the captions are those of a demo left alone."""
    small = {"steps": (2, 4), "scenes": 120, "width": 96, "height": 64}
    alone = run_demo(tmp_path / "alone", **small)
    monkeypatch.setattr("fastidc.demo.SAVED_MINUTES", 1e-9)
    original = StageRun.on_step

    def dies(self, step):
        original(self, step)
        if self.session.stage == "finetune" and step.number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StageRun, "on_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", **small)
    monkeypatch.setattr(StageRun, "on_step", original)
    capsys.readouterr()
    again = run_demo(tmp_path / "demo", resume="auto", **small)
    said = capsys.readouterr().out
    assert "adapt: the run is finished; there is nothing to resume." in said
    assert "goes on after step 3" in said
    assert {**again, "seconds": 0} == {**alone, "seconds": 0}
    assert (tmp_path / "demo" / "hyp_test.json").read_bytes() == (tmp_path / "alone" / "hyp_test.json").read_bytes()


@pytest.mark.slow
def test_demo_learns_to_describe_changes(tmp_path):
    """The whole demo, as `make demo` runs it."""
    metrics = run_demo(tmp_path / "demo")
    hypotheses = check_files(tmp_path / "demo", metrics)
    assert len(hypotheses) >= 500
    assert metrics["captions"]["overall"]["CIDEr"] >= metrics["constant"]["scores"]["overall"]["CIDEr"] + 0.4
    assert metrics["change/no-change accuracy"]["accuracy"] >= 0.85
    assert metrics["distinct captions"] >= 100
