"""The probability of a change against brute force, and what travels with the model."""

import json
import math

import pytest
import torch
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import MAX_WORDS, SENTENCES, image_pairs, run_folder

from fastidc import CLIP4IDC, Describer, FastidcError, PairRecord, Tokenizer
from fastidc.data.images import ImageStore, decode
from fastidc.describe import (
    NoChange,
    change_probabilities,
    fit_change_probability,
    no_change,
    no_change_sentences,
    write_change_probabilities,
    write_no_change,
)
from fastidc.describe.no_change import Sentences, change_probability, sentence_log_probs
from fastidc.evaluate.predict import references_of
from fastidc.evaluate.probability import calibrate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return image_pairs(tmp_path_factory.mktemp("pairs"), 4)


def tensors(pair):
    return [torch.tensor(decode(path, 48)).permute(2, 0, 1)[None] for path in pair]


@torch.no_grad()
def brute_force(run, pair, sentences=SENTENCES):
    """log p of each sentence, one at a time from whole logits, in float64."""
    model = CLIP4IDC.from_pretrained(run).eval().double()
    found = []
    for sentence in sentences:
        inputs, targets = Tokenizer.of(model.config).caption(sentence, MAX_WORDS)
        logits = model.caption_logits(*tensors(pair), torch.tensor([inputs]))[0]
        found.append(sum(float(logits[i].log_softmax(-1)[word]) for i, word in enumerate(targets)))
    return found


def test_p_change_is_one_minus_the_sentences_share(run, pairs):
    describer = Describer(run, "cpu")
    for found, pair in zip(describer.many(pairs), pairs, strict=True):
        expected = 1 - math.fsum(math.exp(x) for x in brute_force(run, pair))
        assert found.p_change == pytest.approx(expected, abs=1e-6)
        assert 1 - expected > 1e-4, "the sentences have a share, or nothing is tested"
        assert 1 - found.p_change == pytest.approx(1 - expected, rel=1e-3)
        assert found.p_change_reason is None


@pytest.mark.parametrize(("rows", "logits"), [(1 << 14, 1 << 24), (1, 1), (30, 100)])
def test_pieces_change_nothing(run, pairs, monkeypatch, rows, logits):
    """All pairs and sentences at once, or a piece at a time, are brute force in float64."""
    monkeypatch.setattr(no_change, "ROWS", rows)
    monkeypatch.setattr(no_change, "LOGITS", logits)
    model = CLIP4IDC.from_pretrained(run).eval().double()
    sentences = Sentences(Tokenizer.of(model.config), [*SENTENCES, "the red cube left of the sphere moved"], MAX_WORDS)
    with torch.no_grad():
        tokens = torch.cat([model.encode_pair(*tensors(pair))[1] for pair in pairs])
        found = sentence_log_probs(model, tokens, sentences)
    assert found.shape == (4, 4)
    assert found.dtype == torch.float64
    expected = torch.tensor([brute_force(run, pair, [*SENTENCES, "the red cube left of the sphere moved"]) for pair in pairs])
    assert torch.allclose(found, expected.double(), rtol=1e-6)


def test_equal_tokens_count_once(run, pairs):
    written = NoChange((*SENTENCES, "Nothing  has changed", "no zebra change"))
    assert len(Sentences(Tokenizer.of(CLIP4IDC.from_pretrained(run).config), written.sentences, MAX_WORDS)) == 3
    assert Describer(run, "cpu", no_change=written)(*pairs[0]).p_change == Describer(run, "cpu")(*pairs[0]).p_change


def test_the_pad_id_inside_a_sentence_is_a_word(run, pairs):
    class Exclaiming:
        def caption(self, text, max_words):
            return ([118, 5, 0, 0], [5, 0, 0, 119]) if text == "long" else ([118, 7], [7, 119])

    model = CLIP4IDC.from_pretrained(run).eval().double()
    end = model.config.end_id
    sentences = Sentences(Exclaiming(), ["long", "short"], MAX_WORDS)
    sentences.targets[sentences.targets == 119], sentences.inputs[sentences.inputs == 118] = end, model.config.start_id
    with torch.no_grad():
        found = sentence_log_probs(model, model.encode_pair(*tensors(pairs[0]))[1], sentences)[0]
        logits = model.caption_logits(*tensors(pairs[0]), sentences.inputs[:1])[0].log_softmax(-1)
    assert float(found[0]) == pytest.approx(sum(float(logits[i, word]) for i, word in enumerate((5, 0, 0, end))), rel=1e-9)


def test_nothing_is_lost_near_certainty():
    logs = torch.tensor([[-1e-13, -900.0], [-800.0, -800.0], [1e-9, -3.0], [math.log(0.25), math.log(0.5)]], dtype=torch.float64)
    found = change_probability(logs).tolist()
    assert found[0] == pytest.approx(1e-13, rel=1e-2)
    assert found[1] == 1
    assert found[2] == 0, "rounding must not make a probability negative"
    assert found[3] == pytest.approx(0.25)


def scenes(folder, count):
    return [
        PairRecord(
            f"scene{i}",
            *(worlds.noise_image(folder / f"{i}{side}.png", 3 * i + k) for k, side in enumerate("ab")),
            ("the red cube left of the sphere moved",),
            worlds.noise_image(folder / f"{i}c.png", 3 * i + 2),
            ("nothing", SENTENCES[1 + i % 2], " "),
        )
        for i in range(count)
    ]


def test_sentences_of_a_split_are_distinct_and_in_order(tmp_path):
    assert no_change_sentences(scenes(tmp_path, 3)) == SENTENCES
    assert no_change_sentences([]) == []


def test_a_split_is_scored_pair_by_pair(run, tmp_path):
    records, describer = scenes(tmp_path, 3), Describer(run, "cpu")
    model, tokenizer = describer.ready.model, describer.ready.tokenizer
    found = change_probabilities(model, tokenizer, records, ImageStore(48), SENTENCES, max_words=MAX_WORDS, batch_size=2)
    assert list(found) == list(references_of(records))
    for record in records:
        assert found[record.id] == pytest.approx(describer(record.before, record.after).p_change, abs=1e-6)
        assert found[record.no_change_id] == pytest.approx(describer(record.before, record.distractor).p_change, abs=1e-6)
    path = write_change_probabilities(tmp_path, "val", found)
    assert path.name == "change_val.json"
    assert json.loads(path.read_text()) == found


def test_the_calibration_is_fitted_to_what_is_known_of_the_pairs(tmp_path):
    records = scenes(tmp_path, 2)
    scores = {"scene0": 0.9, "scene1": 0.3, "scene0_n": 0.1, "scene1_n": 0.4}
    fitted = calibrate([0.9, 0.3, 0.1, 0.4], [1, 1, 0, 0])
    found = fit_change_probability(scores, records)
    assert found == {"scale": pytest.approx(fitted.scale), "shift": pytest.approx(fitted.shift), "split": "val", "pairs": 4}
    assert found["scale"] != pytest.approx(1, abs=1e-3)
    alone = [PairRecord("x", records[0].before, records[0].after, ("it moved",))]
    assert fit_change_probability({"x": 0.5}, alone) is None, "from one kind of pair nothing can be learnt"


def test_a_calibration_travels_with_the_model(tmp_path, pairs):
    plain = run_folder(tmp_path / "plain")
    fitted = run_folder(tmp_path / "fitted", calibration={"scale": 0.5, "shift": -1.0, "split": "val", "pairs": 4})
    raw = Describer(plain, "cpu")(*pairs[0]).p_change
    found = Describer(fitted, "cpu")(*pairs[0]).p_change
    assert found == pytest.approx(1 / (1 + math.exp(1 - 0.5 * math.log(raw / (1 - raw)))), abs=1e-9)
    assert abs(found - raw) > 0.01
    known = NoChange.of_run(fitted)
    for p in (0.0, 1.0):  # float64 can be that certain
        assert 0 < known.calibrated(p) < 1


@pytest.mark.parametrize("sentences", [None, []])
def test_without_sentences_there_is_a_reason(tmp_path, pairs, sentences):
    found = Describer(run_folder(tmp_path / "run", sentences), "cpu")(*pairs[0])
    assert found.p_change is None
    assert str(tmp_path) in found.p_change_reason
    assert "unknown" in found.said()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "sentences"),
        ('{"sentences": "none"}', "sentences"),
        ('{"sentences": [1]}', "sentences"),
        ('{"sentences": [], "calibration": {"scale": 1}}', "calibration"),
        ('{"sentences": [], "calibration": {"scale": 1, "shift": NaN}}', "calibration"),
        ('{"sentences": [], "calibration": [1]}', "calibration"),
        ("{", "JSON"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path, content, sentence):
    (tmp_path / "no_change.json").write_text(content)
    with pytest.raises(FastidcError, match=rf"no_change\.json.*{sentence}"):
        NoChange.of_run(tmp_path)


def test_the_file_holds_what_was_written(tmp_path):
    write_no_change(tmp_path, SENTENCES, {"scale": 1.5, "shift": 0.0})
    assert NoChange.of_run(tmp_path) == NoChange(tuple(SENTENCES), {"scale": 1.5, "shift": 0.0})
    assert NoChange.of_run(tmp_path / "absent") is None
