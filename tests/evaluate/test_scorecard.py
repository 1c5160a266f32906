import csv
import itertools
import json
import sys
import time

import numpy as np
import pytest
from evaluate_oracle import python_scores

from fastidc.errors import FastidcError
from fastidc.evaluate import java as java_module
from fastidc.evaluate.background import BackgroundScorer
from fastidc.evaluate.blocks import subsets_of
from fastidc.evaluate.captions import score_by_subset, score_captions
from fastidc.evaluate.coco import read_overlaps, read_types
from fastidc.evaluate.intervals import meteor_of, meteor_statistics, middle
from fastidc.evaluate.meteor import MeteorDesk, one_meteor
from fastidc.evaluate.paraphrases import words_of
from fastidc.evaluate.scorecard import match, score

REFERENCES = {"1.png": ["the cube is gone", ""], "2.png": ["a ball moved"], "2.png_n": ["there is no change", "nothing moved"]}
CAPTIONS = {"1.png": "", "2.png": "a ball has moved", "2.png_n": "nothing changed"}


def test_empty_sentences_score_as_pycocoevalcaps_and_are_named(no_java):
    said = []
    card = score(REFERENCES, CAPTIONS, resamples=0, report=said.append)
    expected, each = python_scores(list(REFERENCES.values()), list(CAPTIONS.values()))
    overall = card.scores["overall"]
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
    np.testing.assert_allclose([overall[name] for name in names], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose([[row[name] for name in names] for row in card.captions.values()], each, rtol=0, atol=1e-9)
    assert card.captions["1.png"]["ROUGE-L"] == 1.0  # pycocoevalcap's, for an empty caption of an empty reference
    assert [sentence[:42] for sentence in said] == [
        "1 id ('1.png') with an empty reference, sc",
        "1 id ('1.png') with an empty caption, scor",
    ]
    assert card.warnings == said


def test_json_and_csv_have_pycocoevalcaps_names_and_raw_values(no_java, tmp_path):
    card = score(REFERENCES, CAPTIONS, types={"1.png": "drop", "2.png": "move"}, overlaps={"1.png": 0.2, "2.png": 1.0}, resamples=50)
    content = json.loads(json.dumps(card.as_json()))
    assert list(content)[:5] == ["overall", "change", "no_change", "types", "iou"]
    assert list(content["iou"]) == ["0.2-0.4", "0.8-1.0"]
    overall = content["overall"]
    for ours, theirs in (("BLEU-1", "Bleu_1"), ("BLEU-4", "Bleu_4"), ("ROUGE-L", "ROUGE_L"), ("CIDEr", "CIDEr")):
        assert overall[theirs] == card.scores["overall"][ours]
        low, high = overall["intervals"][theirs]
        assert low <= overall[theirs] <= high
        assert low < high
    assert overall["METEOR"] is overall["intervals"]["METEOR"] is None
    assert "no java on PATH" in content["reasons"]["METEOR"]
    assert (overall["pairs"], content["change"]["pairs"], content["types"]["move"]["pairs"]) == (3, 2, 1)
    assert (content["tokenizer"], content["bootstrap"]["resamples"]) == ("ptb-regex", 50)
    assert content["constant"]["overall"]["CIDEr"] >= 0
    rows = list(csv.DictReader(card.write_csv(tmp_path / "out.csv").open()))
    assert [row["image_id"] for row in rows] == list(CAPTIONS)
    assert float(rows[1]["CIDEr"]) == card.captions["2.png"]["CIDEr"]
    assert rows[0]["METEOR"] == ""
    table = card.table()
    assert all(word in table for word in ("no change", "  move", "  IoU 0.2-0.4", "constant caption", "METEOR -: there is no java"))
    assert max(map(len, table.splitlines()[:8])) <= 110


def test_constant_is_left_out_where_no_reference_has_a_word(no_java):
    card = score({"a": ["."], "b": [""]}, {"a": "x", "b": "y"}, resamples=0)
    assert card.constant is None
    assert card.scores["overall"]["CIDEr"] == 0.0


def test_ids_that_differ_are_counted_and_named():
    references = {str(number): ["x"] for number in range(10)}
    with pytest.raises(
        FastidcError, match=r"8 ids \('2', '3', '4', '5', '6', \.\.\.\) without a caption and 1 id \('z'\) without ref.*--subset"
    ):
        match(references, {"0": "x", "1": "y", "z": "q"}, False, ("gt.json", "hyp.json"))
    both, warnings = match(references, {"1": "y", "0": "x", "z": "q"}, True, ("gt.json", "hyp.json"))
    assert list(both) == ["0", "1"]
    assert "the 2 ids in both are scored" in warnings[0]
    assert match(references, dict.fromkeys(references, "x"), False, ("a", "b"))[1] == []
    with pytest.raises(FastidcError, match="no id in common"):
        match(references, {"z": "q"}, True, ("gt.json", "hyp.json"))


def test_overlaps_go_to_the_change_pairs_of_their_bin():
    pairs = ["1.png", "2.png", "1.png_n", "3.png"]
    subsets = subsets_of(pairs, None, {"1.png": 0.2, "2.png": 1.0, "1.png_n": 0.2})
    assert subsets["iou/0.2-0.4"] == ["1.png"]
    assert subsets["iou/0.8-1.0"] == ["2.png"]
    assert [name for name in subsets if name.startswith("iou")] == ["iou/0.2-0.4", "iou/0.8-1.0"]


def test_type_and_iou_files_are_read_and_bad_ones_named(tmp_path):
    file = tmp_path / "f.json"
    file.write_text('{"color": ["000001.png", 7], "move": ["2.png"]}')
    assert read_types(file) == {"000001.png": "color", "7": "color", "2.png": "move"}
    file.write_text('{"1": "0.5", "12": 1.0}')
    assert read_overlaps(file, ["000001.png", "CLEVR_default_000012.png", "000001.png_n", "3.png", "x"]) == {
        "000001.png": 0.5,
        "CLEVR_default_000012.png": 1.0,
    }
    for read, content, message in (
        (read_types, "[]", "an object {type"),
        (read_types, '{"color": 3}', "'color' is a number"),
        (read_types, '{"color": [null]}', r"color\[0\] is missing"),
        (read_types, '{"color": ["a"], "move": ["a"]}', r"move\[0\] 'a' is also of type 'color'"),
        (lambda path: read_overlaps(path, []), "[]", "an object {scene"),
        (lambda path: read_overlaps(path, []), '{"1": "x"}', "'1' is 'x'"),
        (lambda path: read_overlaps(path, []), '{"1": 1.5}', "'1' is 1.5"),
        (lambda path: read_overlaps(path, []), '{"1": NaN}', "'1' is nan"),
        (lambda path: read_overlaps(path, []), '{"a": 0.5}', "'a' is 0.5"),
    ):
        file.write_text(content)
        with pytest.raises(FastidcError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value)


def test_scores_in_the_background_are_the_scores_and_nobody_waits(monkeypatch, clevr):
    """The caller goes on while a set is scored: the scorer here cannot end before the caller lets it."""
    import threading

    from fastidc.evaluate import captions as module

    references, hypotheses, types = clevr
    options = {"meteor": False, "tokenizer": "ptb-regex"}
    go, tokenize = threading.Event(), module.tokenize

    def waiting(*arguments):
        assert go.wait(30)
        return tokenize(*arguments)

    monkeypatch.setattr(module, "tokenize", waiting)
    with BackgroundScorer(references, **options) as scorer:
        handed = dict(hypotheses)
        futures = [scorer.submit(handed, types), scorer.submit({"nobody": "x"}), scorer.submit(dict.fromkeys(hypotheses, "a cube"))]
        handed.clear()  # training may do with its captions what it wants
        assert not any(future.done() for future in futures[::2])
        go.set()
    assert futures[0].result() == score_by_subset(references, hypotheses, types, **options)
    assert "'nobody' has no references" in str(futures[1].exception())
    assert futures[2].result()["overall"] == score_captions(references, dict.fromkeys(hypotheses, "a cube"), **options)


def test_an_error_does_not_wait_for_scores_that_have_not_begun(clevr):
    references, hypotheses, _ = clevr
    with pytest.raises(KeyError), BackgroundScorer(references, meteor=False, tokenizer="ptb-regex") as scorer:  # noqa: PT012
        futures = [scorer.submit(hypotheses) for _ in range(30)]
        raise KeyError
    assert all(future.done() for future in futures)
    assert any(future.cancelled() for future in futures)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for java is a shell script: run this on Linux or macOS")
def test_another_meteor_scores_its_own_statistics(monkeypatch, tmp_path, clevr):
    """Statistics that are not METEOR 1.5's are added up by their jar, and have no interval."""
    references, hypotheses, _ = clevr
    fake = tmp_path / "java"
    answer = 'n=$(echo "$line" | grep -o "|||" | wc -l); i=1; while [ $i -le $n ]; do echo 0.1; i=$((i+1)); done; echo 0.25'
    fake.write_text(f'#!/bin/sh\nwhile read line; do case "$line" in EVAL*) {answer};; *) echo 1.0 2.0;; esac; done\n')
    fake.chmod(0o755)
    monkeypatch.setattr(java_module, "find_java", lambda: str(fake))
    monkeypatch.setattr(java_module, "table_for", lambda words, table, stop: table)
    monkeypatch.setattr("fastidc.evaluate.captions.tokenize", lambda sentences, _: (list(sentences), "ptb-regex", None))
    card = score(references, hypotheses, resamples=20)
    for block in (card.scores["overall"], card.scores["change"]):
        assert block["METEOR"] == 0.25
        assert block["intervals"]["METEOR"] is None
        assert "not METEOR 1.5's" in block["METEOR_interval_reason"]
    assert {row["METEOR"] for row in card.captions.values()} == {0.1}
    assert card.as_json()["reasons"] == {"METEOR_interval": "the jar's statistics are not METEOR 1.5's"}


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for java is a shell script: run this on Linux or macOS")
def test_one_process_for_everything_within(monkeypatch, tmp_path):
    """Also nested and from several scorers; one that fails is not handed on; the outermost block's end is the process's."""
    fake, starts = tmp_path / "java", tmp_path / "starts"
    row = " ".join(["1.0"] * 23)
    fake.write_text(
        f'#!/bin/sh\necho $$ >> {starts}\nwhile read line; do case "$line" in EVAL*) echo 0; echo 0;; *) echo {row};; esac; done\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(java_module, "find_java", lambda: str(fake))
    monkeypatch.setattr(java_module, "table_for", lambda words, table, stop: table)

    def ask(*desks, word="b"):
        for desk in desks:
            desk.start(["a b"])
            assert desk.ask([["a"]], [word]).lines == [row]
            desk.close()

    count = lambda: len(starts.read_text().split())  # noqa: E731
    with one_meteor():
        ask(MeteorDesk(), MeteorDesk())
        with one_meteor():
            ask(MeteorDesk())
        broken = MeteorDesk()
        process = broken._begin(frozenset("ab"))
        assert count() == 1
        assert process._process.poll() is None
        broken.abort()
        assert process._process.poll() is not None
        ask(MeteorDesk())
        assert count() == 2
        ask(MeteorDesk(), MeteorDesk(), word="new")  # of which its table may lack what it matches
        assert count() == 3
        last = MeteorDesk()
        process = last._begin(frozenset(["a", "b", "new"]))
        assert count() == 3
    assert process._process.poll() is not None
    ask(MeteorDesk())
    assert count() == 4


def test_a_desk_that_is_closed_while_its_process_starts_leaves_none(monkeypatch):
    """Whether the end comes before the process or just after it."""
    made = []

    class Process:
        def __init__(self, words, stop):
            made.append(self)
            self.open = True
            desk.close()

        def close(self):
            self.open = False

    monkeypatch.setattr("fastidc.evaluate.meteor.Meteor", Process)
    desk = MeteorDesk()
    desk.start(["a"])
    for _ in range(1000):
        if made and not made[0].open:
            break
        time.sleep(0.01)
    assert [process.open for process in made] == [False]
    assert desk.process is None
    assert desk.ask([["a"]], ["a"]) is None
    assert desk.reason is None


@pytest.mark.slow
def test_meteor_of_its_statistics_is_the_jars(java, clevr):
    """Each caption's score and the corpus's, from statistics lines: also an empty caption, one that is its reference, and no match."""
    references, hypotheses, _ = clevr
    pairs = list(references)
    captions = [hypotheses[pair] for pair in pairs]
    captions[:3] = ["", references[pairs[1]][0], "zebra"]
    with java_module.Meteor() as meteor:
        lines = meteor.segments([references[pair] for pair in pairs], captions)
        corpus, each = meteor.corpus(lines)
        repeated = meteor.segments([["a cube"], ["a ball"], ["a cube"]], ["a cube", "a cube", "a cube"])
    statistics = meteor_statistics(lines)
    np.testing.assert_allclose(meteor_of(statistics), each, rtol=0, atol=1e-12)
    assert float(meteor_of(statistics.sum(axis=0))) == pytest.approx(corpus, abs=1e-12)
    assert each[1] == pytest.approx(1.0)
    assert repeated[0] == repeated[2] != repeated[1]
    assert meteor_statistics(["1.0 2.0"]) is None


@pytest.mark.slow
def test_the_best_reference_is_the_one_that_the_jar_takes(java, spot_test, clevr):
    """Line by line, of real sentences and of a grammar's, whose references are often equally good; empty ones too."""
    references, captions, _ = clevr
    several = [*references.values(), *spot_test.values(), [""], ["", "a cube"]]
    real = [sentences[0] for sentences in spot_test.values()]
    chosen = [*captions.values(), *real[1:], real[0], "a cube", ""]
    desk = MeteorDesk()
    desk._begin(words_of([*itertools.chain.from_iterable(several), *chosen]))
    try:
        answer = desk._aligned(several, chosen)
        assert answer.lines == desk.process.segments(several, chosen)
        np.testing.assert_array_equal(answer.statistics, meteor_statistics(answer.lines))
    finally:
        desk.close()


def test_a_jar_that_takes_another_reference_is_believed():
    """It decides over all references of each caption then."""

    class Process:
        def __init__(self):
            self.asked = []

        def segments(self, references, captions, progress=False):
            self.asked.append((references, captions))
            return [" ".join(["5.0" if len(several) > 1 else f"{number}.0"] * 23) for number, several in enumerate(references)]

        def corpus(self, lines):
            return 0.5, [0.5] * len(lines)

        def knows(self, words):
            return True

    desk = MeteorDesk()
    desk.process = Process()
    answer = desk.ask([["a", "b"], ["a", "c"]], ["a", "b"])
    assert answer.lines == [" ".join(["5.0"] * 23)] * 2
    assert answer.sample == 0.5
    assert desk.process.asked[-1] == ([["a", "b"], ["a", "c"]], ["a", "b"])
    assert [["a"], ["b"], ["a"], ["c"]] in [references for references, _ in desk.process.asked]


def test_the_published_predictions_have_their_scores(java, real_folder):
    """DDLA's predictions for Spot-the-Diff (code/predictions of harsh19/spot-the-diff) against its test references."""
    file = real_folder / "spot_the_diff" / "ddla_rerun_predfile.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there: put code/predictions/ddla_rerun_predfile.json of harsh19/spot-the-diff beside the annotations")
    predictions = {str(entry["image_id"]): entry["caption"] for entry in json.loads(file.read_text())}
    references = {}
    for entry in json.loads((real_folder / "spot_the_diff" / "test.json").read_text()):
        references.setdefault(entry["img_id"], []).extend(entry["sentences"])
    scores = score_captions(references, predictions, keep_empty_references=True)
    expected = {
        "BLEU-1": 0.2963,
        "BLEU-2": 0.1870,
        "BLEU-3": 0.1176,
        "BLEU-4": 0.0757,
        "METEOR": 0.1091,
        "ROUGE-L": 0.2797,
        "CIDEr": 0.3506,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_an_interval_is_the_middle():
    assert middle(np.arange(101.0)) == pytest.approx([2.5, 97.5])
    assert middle(np.arange(101.0), 0.5) == pytest.approx([25, 75])
