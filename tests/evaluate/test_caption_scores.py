import os
import random
import subprocess
import sys
import tempfile

import pytest

from fastidc.errors import FastidcError
from fastidc.evaluate import java as java_module
from fastidc.evaluate.captions import METRICS, CaptionScorer, best_constant_caption, score_by_subset, score_captions
from fastidc.evaluate.constant import constant_cider

CLOSE = {"rel": 0, "abs": 1e-9}


def plain_tokens(references, hypotheses):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = PTBTokenizer().tokenize({pair: [{"caption": text} for text in references[pair]] for pair in hypotheses})
    return gts, PTBTokenizer().tokenize({pair: [{"caption": text}] for pair, text in hypotheses.items()})


def plain(gts, res, meteor=None, pairs=None):
    """The scores as pycocoevalcap's own classes give them, on `pairs` only; `meteor` is one of its Meteor objects."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if pairs is not None:
        gts, res = {pair: gts[pair] for pair in pairs}, {pair: res[pair] for pair in pairs}
    scores = dict(zip(METRICS[:4], Bleu(4).compute_score(gts, res, verbose=0)[0]))
    scores |= {"ROUGE-L": Rouge().compute_score(gts, res)[0], "CIDEr": Cider().compute_score(gts, res)[0]}
    if meteor is not None:
        scores["METEOR"] = meteor.compute_score(gts, res)[0]
    return {metric: float(value) for metric, value in scores.items()}


def same(scores, expected):
    assert {metric: scores[metric] for metric in expected} == pytest.approx(expected, **CLOSE)


@pytest.fixture(scope="module")
def hostile(java, tmp_path_factory):
    """A scorer of the CLEVR sentences where every fault of pycocoevalcap's own drivers is set: German numbers through both variables of
    the JVM, a blank in the path of the jars, and no temporary file to be had. One METEOR process for the tests of this module."""
    blank = tmp_path_factory.mktemp("with blank") / "site packages"
    find = java_module._jar

    def jar(package, name):
        (blank / package).parent.mkdir(exist_ok=True)
        if not (blank / package).exists():
            (blank / package).symlink_to(find(package, name).parent)
        return blank / package / name

    def refuse(*_, **__):
        raise PermissionError("read-only")

    patch = pytest.MonkeyPatch()
    patch.setattr(java_module, "_jar", jar)
    patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    patch.setenv("_JAVA_OPTIONS", "-Duser.language.format=de")
    patch.setattr(tempfile, "NamedTemporaryFile", refuse)
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def official_meteor(java):
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


@pytest.fixture(scope="module")
def clevr_scores(hostile, clevr):
    references, hypotheses, types = clevr
    with CaptionScorer(references) as scorer:
        scores = scorer.by_subset(hypotheses, types)
        first = scorer._meteor.process
        constant = scorer.best_constant(types=types)
        assert scorer._meteor.process is first  # one process for everything
    assert first._process.poll() is not None
    hostile.undo()
    return scores, constant


def test_subsets_are_what_pycocoevalcap_gives_for_them(clevr_scores, clevr, official_meteor):
    scores, _ = clevr_scores
    references, hypotheses, types = clevr
    tokens = plain_tokens(references, hypotheses)
    change = [pair for pair in hypotheses if not pair.endswith("_n")]
    same(scores["overall"], plain(*tokens, official_meteor))
    same(scores["change"], plain(*tokens, official_meteor, change))
    same(scores["no_change"], plain(*tokens, official_meteor, [pair for pair in hypotheses if pair.endswith("_n")]))
    assert list(scores["types"]) == ["color", "material", "add", "drop", "move"]
    for kind, block in scores["types"].items():
        same(block, plain(*tokens, official_meteor, [pair for pair in change if types[pair] == kind]))
    assert [scores[name]["pairs"] for name in ("overall", "change", "no_change")] == [40, 20, 20]
    assert all(block["pairs"] == 4 for block in scores["types"].values())
    assert scores["overall"]["tokenizer"] == "ptb-java"
    assert "METEOR_reason" not in scores["overall"]


def test_the_constant_caption_has_its_own_subsets(clevr_scores, clevr):
    scores, (caption, constant) = clevr_scores
    references = clevr[0]
    tokens = plain_tokens(references, dict.fromkeys(references, caption))
    same(constant["overall"], plain(*tokens))
    same(constant["change"], plain(*tokens, None, [pair for pair in references if not pair.endswith("_n")]))
    assert constant["overall"]["METEOR"] > 0
    assert set(constant) == set(scores)


def test_the_constant_caption_is_the_best_of_all_references(clevr):
    references, _, _ = clevr
    caption, scores = best_constant_caption(references, meteor=False, tokenizer="ptb-regex")
    every = sorted({sentence for sentences in references.values() for sentence in sentences})
    values = dict(zip(every, constant_cider(list(references.values()), every)))
    assert values[caption] == max(values.values())
    assert scores["overall"]["CIDEr"] == pytest.approx(values[caption], **CLOSE)


def test_cider_of_constants_is_pycocoevalcaps(clevr):
    references, _, _ = clevr
    candidates = ["there is no change", "the red cube red cube moved", "zebra", "", "the", references["000000.png"][0]]
    for candidate, value in zip(candidates, constant_cider(list(references.values()), candidates), strict=True):
        scores = score_captions(references, dict.fromkeys(references, candidate), meteor=False, tokenizer="ptb-regex")
        assert value == pytest.approx(scores["CIDEr"], **CLOSE)


def test_given_candidates_are_the_only_ones(clevr):
    references, _, _ = clevr
    caption, _ = best_constant_caption(references, ["A zebra.", "Nothing has changed.", "nothing has changed"], meteor=False)
    assert caption == "Nothing has changed."
    with pytest.raises(FastidcError, match="no candidate"):
        best_constant_caption(references, [], meteor=False)


def test_real_references_score_as_pycocoevalcap_scores_them(java, spot_test):
    pairs = list(spot_test)
    # Every other pair gets its own first reference, the rest that of the pair after it.
    hypotheses = {pair: spot_test[pairs[(number + number % 2) % len(pairs)]][0] for number, pair in enumerate(pairs)}
    scores = score_captions(spot_test, hypotheses, meteor=False, keep_empty_references=True)
    assert scores["pairs"] == 1270
    same(scores, plain(*plain_tokens(spot_test, hypotheses)))


def test_generated_sentences_score_as_pycocoevalcap_scores_them(java):
    draw = random.Random(3)
    words = ["a", "the", "cube", "Cube's", "can't", "left,", "right.", "(old)", "new", "-", "3", "co-op", "it's", "U.S.", "gone!"]
    sentence = lambda: " ".join(draw.choices(words, k=draw.randint(0, 12)))  # noqa: E731
    references = {str(number): [sentence() for _ in range(draw.randint(1, 5))] for number in range(400)}
    hypotheses = {pair: sentence() for pair in references}
    same(score_captions(references, hypotheses, meteor=False, keep_empty_references=True), plain(*plain_tokens(references, hypotheses)))


def test_separators_do_not_shift_scores(java, clevr):
    references, hypotheses, _ = clevr
    marks = ["\r", "\u2028", "\x0c", "\u2029", "\x85", "\x0b"]
    torn = {pair: text.replace(" ", marks[number % 6], 1) for number, (pair, text) in enumerate(hypotheses.items())}
    torn_references = {
        pair: [text.replace(" ", marks[number % 6], 1) for number, text in enumerate(texts)] for pair, texts in references.items()
    }
    assert score_captions(torn_references, torn, meteor=False) == score_captions(references, hypotheses, meteor=False)


def test_without_java_meteor_is_none_with_a_reason(monkeypatch, clevr, capfd):
    references, hypotheses, types = clevr
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    scores = score_by_subset(references, hypotheses, types)
    for block in (scores["overall"], scores["change"], scores["types"]["move"]):
        assert block["METEOR"] is None
        assert "no java on PATH" in block["METEOR_reason"]
        assert block["tokenizer"] == "ptb-regex"
        assert "no java on PATH" in block["tokenizer_reason"]
        assert all(block[metric] > 0 for metric in METRICS if metric != "METEOR")
    assert java_module.java_status() == (False, "there is no java on PATH or under JAVA_HOME; install a Java runtime (8 or newer)")
    assert capfd.readouterr() == ("", "")


def test_scores_without_java_are_those_with_it(monkeypatch, java, clevr):
    references, hypotheses, _ = clevr
    with_java = score_captions(references, hypotheses, meteor=False, tokenizer="ptb-java")
    monkeypatch.setattr(java_module, "find_java", lambda: None)
    without = score_captions(references, hypotheses, meteor=False)
    assert {metric: with_java[metric] for metric in METRICS} == {metric: without[metric] for metric in METRICS}


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for java is a shell script: run this on Linux or macOS")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Picked up JAVA_TOOL_OPTIONS: x' >&2; echo 'java.lang.OutOfMemoryError: heap' >&2; exit 1", "OutOfMemoryError: heap"),
        ("while read line; do echo 'Error: specify SCORE or EVAL or SING'; done", "instead of statistics"),
        ('while read line; do case "$line" in EVAL*) echo 0,5;; *) echo 1.0 2.0;; esac; done', "'0,5' instead of a score"),
        ("head -c 2000000 /dev/zero | tr '\\0' 'e' >&2; echo >&2; echo 'Exception: late' >&2; exit 3", "Exception: late"),
        ("exec sleep 30", "no answer within 1 s"),
    ],
)
def test_a_meteor_that_fails_is_none_with_a_reason(monkeypatch, tmp_path, clevr, script, reason):
    references, hypotheses, _ = clevr
    fake = tmp_path / "java"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(java_module, "find_java", lambda: str(fake))
    monkeypatch.setattr(java_module, "table_for", lambda words, table, stop: table)
    if "sleep" in script:
        monkeypatch.setattr(java_module, "_START_LIMIT", 1 - 0.5 * len(hypotheses))  # each caption adds half a second
    scores = score_captions(references, hypotheses, tokenizer="ptb-regex")
    assert scores["METEOR"] is None
    assert reason in scores["METEOR_reason"]
    assert scores["CIDEr"] > 0


def test_empty_references_are_dropped_unless_asked_for(java):
    references = {"a": ["the cube is gone", ""], "b": ["the ball moved", " . "], "c": [""]}
    hypotheses = {"a": "", "b": "the ball moved", "c": "x"}
    ours = score_captions(references, hypotheses, meteor=False)
    official = score_captions(references, hypotheses, meteor=False, keep_empty_references=True)
    assert ours["ROUGE-L"] == pytest.approx(1 / 3)
    assert official["ROUGE-L"] == pytest.approx(2 / 3)  # the empty caption has all of the empty reference
    same(official, plain(*plain_tokens(references, hypotheses)))


def test_one_pair_and_wordless_references_are_scored():
    scores = score_captions({"a": ["the cube"]}, {"a": "the cube"}, meteor=False, tokenizer="ptb-regex")
    assert scores["BLEU-1"] == pytest.approx(1)
    assert scores["CIDEr"] == 0.0  # its only pair makes every document frequency the number of pairs
    assert score_captions({"a": ["."]}, {"a": "x"}, meteor=False, tokenizer="ptb-regex")["CIDEr"] == 0.0


def test_subsets_without_pairs_are_left_out():
    references = {"1.png": ["a cube moved"], "2.png": ["a ball moved"]}
    options = {"meteor": False, "tokenizer": "ptb-regex"}
    assert list(score_by_subset(references, dict.fromkeys(references, "a cube"), **options)) == ["overall"]
    scores = score_by_subset(references, {"1.png": "a cube"}, {"1.png": "move", "2.png": "add", "3.png": "drop"}, **options)
    assert list(scores) == ["overall", "change", "types"]
    assert list(scores["types"]) == ["move"]


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ({"a": ["x"]}, {}, "no captions to score"),
        ({"a": ["x"]}, {"a": "x", "b": "y"}, "caption of 'b' has no references"),
        ({"a": ["x"]}, {"a": None}, "caption of 'a' is NoneType and not text"),
        ({"a": "x"}, {"a": "x"}, "references of 'a' are not a list of sentences"),
        ({"a": [3]}, {"a": "x"}, "references of 'a' are not a list of sentences"),
        ({"a": []}, {"a": "x"}, "references of 'a' are empty"),
    ],
)
def test_bad_input_is_named(references, hypotheses, message):
    with pytest.raises(FastidcError, match=message):
        score_captions(references, hypotheses, meteor=False, tokenizer="ptb-regex")


def test_importing_starts_nothing():
    code = (
        "import sys, fastidc.evaluate.captions, fastidc.evaluate.retrieval, fastidc.evaluate.report, fastidc.evaluate.coco\n"
        "heavy = {'torch', 'pycocoevalcap', 'pycocotools', 'matplotlib', 'jinja2', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)})
