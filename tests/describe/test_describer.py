"""Captions and their log-probabilities: alone, in batches, and of images in every form."""

import itertools

import numpy as np
import pytest
import torch
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import MAX_WORDS, image_pairs, run_folder
from PIL import Image

import fastidc
from fastidc import CLIP4IDC, Describer, FastidcError
from fastidc.data.images import decode
from fastidc.describe.pixels import AHEAD, batches, to_pixels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return image_pairs(tmp_path_factory.mktemp("pairs"), 7)


@pytest.fixture(scope="module")
def describer(run):
    return Describer(run, "cpu")


def same(one, other, images=True):
    assert (one.caption, one.ids) == (other.caption, other.ids)
    assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    assert one.p_change == pytest.approx(other.p_change, abs=1e-6)
    if images:
        assert (one.before, one.after) == (other.before, other.after)


@pytest.mark.parametrize("beams", [1, 3])
def test_many_are_as_one_by_one(run, pairs, beams):
    describer = Describer(run, "cpu", beams)
    alone = [describer(*pair) for pair in pairs]
    assert len({one.caption for one in alone}) > 1, "the model tells these pairs apart, or nothing is tested"
    for batch_size in (3, 16):
        for one, other in zip(alone, describer.many(pairs, batch_size), strict=True):
            same(one, other)


@pytest.mark.parametrize(("beams", "penalty", "words"), [(1, 0.0, None), (3, 0.0, None), (3, 1.5, None), (2, 0.0, 4)])
def test_log_prob_is_that_of_the_caption_under_teacher_forcing(run, pairs, beams, penalty, words):
    """Computed again from `caption_logits`, in float64."""
    describer = Describer(run, "cpu", beams, length_penalty=penalty, max_words=words)
    model = CLIP4IDC.from_pretrained(run).eval().double()
    ended = set()
    for found in describer.many(pairs):
        images = [torch.tensor(decode(path, 48)).permute(2, 0, 1)[None] for path in (found.before, found.after)]
        inputs = torch.tensor([[model.config.start_id, *found.ids[:-1]]])
        with torch.no_grad():
            words_log = model.caption_logits(*images, inputs).log_softmax(-1)[0]
        expected = sum(float(words_log[i, word]) for i, word in enumerate(found.ids))
        assert found.log_prob == pytest.approx(expected, abs=2e-4)
        assert found.caption == found.text == describer.ready.tokenizer.decode(found.ids)
        has_end = found.ids[-1] == model.config.end_id
        assert model.config.end_id not in found.ids[:-1]
        assert has_end or len(found.ids) == (words or MAX_WORDS)
        ended.add(has_end)
    assert ended == {True, False} or penalty, "both ways to end are met"


def forms(path):
    """The image at ``path`` in every form."""
    rgb = np.asarray(Image.open(path).convert("RGB"))
    return {
        "text": str(path),
        "PIL": Image.open(path),
        "array": rgb,
        "tensor, rows first": torch.from_numpy(rgb.copy()),
        "tensor, channels first": torch.from_numpy(rgb.copy()).permute(2, 0, 1),
        "array, channels first": rgb.transpose(2, 0, 1),
    }


def test_every_form_of_an_image_is_its_file(describer, pairs):
    expected = describer(*pairs[0])
    for name, (before, after) in zip(forms(pairs[0][0]), zip(*(forms(path).values() for path in pairs[0]), strict=True), strict=True):
        found = describer(before, after)
        assert (name, found.ids) == (name, expected.ids)
        same(found, expected, images=False)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA"])
def test_modes_are_read_as_decode_reads_them(tmp_path, mode):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 70, 4), dtype=np.uint8)
    image, path = Image.fromarray(pixels), tmp_path / "image.png"
    if mode == "CMYK":
        image, path = image.convert("RGB").convert("CMYK"), tmp_path / "image.tiff"
    else:
        image = image.convert(mode)
    image.save(path)
    expected = decode(path, 48)
    assert np.array_equal(to_pixels(path, 48), expected)
    assert np.array_equal(to_pixels(Image.open(path), 48), expected)
    if mode in ("L", "RGBA"):
        values = np.asarray(Image.open(path))
        for given in (values, torch.from_numpy(values.copy())):
            assert np.array_equal(to_pixels(given, 48), expected)
        one = values[None] if mode == "L" else values.transpose(2, 0, 1)
        assert np.array_equal(to_pixels(torch.from_numpy(one.copy()), 48), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_seen_as_it_was_held(tmp_path, orientation):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    how = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF -> Pillow's transpose that makes what the camera stored
    stored = Image.fromarray(pixels) if orientation == 1 else Image.fromarray(pixels).transpose(how[orientation])
    note = Image.Exif()
    note[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=note)
    expected = decode(tmp_path / "upright.png", 48)
    assert np.array_equal(to_pixels(tmp_path / "photo.png", 48), expected)
    assert np.array_equal(to_pixels(Image.open(tmp_path / "photo.png"), 48), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_no_caption_is_without_a_word(describer, pairs, beams):
    """Even of a model that would rather end at once."""
    model = describer.ready.model
    bias = model.captioner.head_bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[model.config.end_id] += 50
        found = Describer(model, "cpu", beams)(*pairs[0])
        tokens = model.encode_batch(torch.zeros(1, 2, model.config.image_size, model.config.image_size, 3, dtype=torch.uint8))[1].flatten(
            0, 1
        )
        assert model.generate_from_tokens(tokens, 8, beams)[0][0, 0] == model.config.end_id, "decoding as officially may"
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert found.ids[0] != model.config.end_id
    assert found.ids[1] == model.config.end_id


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (torch.zeros(3, 4, 4), "float32"),
        (np.zeros((5, 4, 2), np.uint8), r"shape \[5, 4, 2\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one image"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (7, "of type int"),
        (None, "of type NoneType"),
    ],
)
def test_what_is_no_image_is_a_sentence(describer, pairs, image, sentence):
    with pytest.raises(FastidcError, match=f"before-image of pair 0.*{sentence}"):
        describer(image, pairs[0][1])


def bad_images(folder):
    whole = worlds.noise_image(folder / "whole.png", 3, (60, 50)).read_bytes()
    contents = {"cut.png": whole[: len(whole) // 2], "page.png": b"<html>", "empty.jpg": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return [folder / name for name in (*contents, "folder.png", "absent.png")]


def test_a_bad_image_costs_its_own_pair_only(describer, pairs, tmp_path):
    bad = bad_images(tmp_path)
    mixed = [pairs[0]]
    for i, path in enumerate(bad):
        mixed += [(path, pairs[1][1]) if i % 2 else (pairs[1][0], path), pairs[i + 2]] if i < 5 else []
    expected = iter([describer(*pair) for pair in mixed[::2]])
    found = list(describer.many(mixed, batch_size=4, errors="return"))
    assert len(found) == len(mixed) == 11
    for i, one in enumerate(found):
        if i % 2:
            assert isinstance(one, FastidcError)
            assert str(bad[i // 2]) in str(one)
            assert "\n" not in str(one)
        else:
            same(one, next(expected))
    stream = describer.many(mixed, batch_size=4)
    same(next(stream), found[0])
    with pytest.raises(FastidcError, match=r"cut\.png"):
        next(stream)
    assert all(isinstance(one, FastidcError) for one in describer.many([(bad[0], bad[1])] * 3, batch_size=2, errors="return"))


def test_a_stream_is_asked_late_and_may_be_endless(describer, pairs):
    asked = []

    def endless():
        for i in itertools.count():
            asked.append(i)
            yield pairs[i % 7]

    stream = describer.many(endless(), batch_size=2)
    found = [next(stream) for _ in range(4)]
    stream.close()
    assert len(asked) <= 4 + 2 * (AHEAD + 1)
    same(found[3], describer(*pairs[3]))


def test_an_error_of_the_stream_comes_after_what_it_gave(describer, pairs):
    def torn():
        yield from pairs[:3]
        raise FastidcError("line 4 is torn.")

    stream = describer.many(torn(), batch_size=2)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(FastidcError, match="line 4"):
        next(stream)
    assert list(describer.many([])) == []


def test_threads_read_ahead_of_the_model(pairs):
    """While a batch is in use the next ones are being decoded, whether anybody has asked for them or not."""
    asked = []
    stream = batches((asked.append(pair) or pair for pair in pairs), 48, 2, workers=1)
    first = next(stream)
    assert first.images.shape == (2, 2, 48, 48, 3)
    assert np.array_equal(first.images[1, 0].numpy(), decode(pairs[1][0], 48))
    assert asked == pairs[: 2 * (AHEAD + 1)]
    stream.close()


def test_describe_is_a_room_and_a_function(run, pairs, describer):
    expected = describer(*pairs[0])
    same(fastidc.describe(*pairs[0], model=describer), expected)
    state = torch.get_rng_state()
    same(fastidc.describe(*pairs[0], model=run, device="cpu"), expected)
    assert torch.equal(torch.get_rng_state(), state), "the caller's draws are left alone"
    assert fastidc.describe.figure is not None
    with pytest.raises(FastidcError, match="beams"):
        fastidc.describe(*pairs[0], model=describer, beams=2)


def test_a_model_in_memory_is_put_into_evaluation_mode(run, pairs, describer):
    model = CLIP4IDC.from_pretrained(run).train()
    found = Describer(model, max_words=MAX_WORDS)(*pairs[0])
    assert not model.training
    assert found.ids == describer(*pairs[0]).ids
    assert found.p_change is None
    assert "no_change.json" in found.p_change_reason


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "toaster"}, "toaster"),
        ({"device": "meta"}, "auto, cpu or cuda"),
        ({"max_words": 99}, "24 positions"),
        ({"max_words": 2}, "max_words is 2"),
        ({"beams": 0}, "beams"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_wrong_options_are_sentences(run, options, sentence):
    with pytest.raises(FastidcError, match=sentence):
        Describer(run, **options)


def test_wrong_calls_are_sentences(describer, pairs):
    with pytest.raises(FastidcError, match="batch_size"):
        list(describer.many(pairs, 0))
    with pytest.raises(FastidcError, match="workers"):
        list(describer.many(pairs, workers=0))
    with pytest.raises(FastidcError, match="errors"):
        describer.many(pairs, errors="ignore")


def test_a_model_that_cannot_caption_is_a_sentence(tmp_path, monkeypatch):
    adapted = run_folder(tmp_path / "adapt", captioner=False)
    with pytest.raises(FastidcError, match=r"adapt: this model has no captioner.*finetune"):
        Describer(adapted)
    with pytest.raises(FastidcError, match="a plain CLIP"):
        Describer(worlds.clip_file(tmp_path / "clip.pt"))
    monkeypatch.delenv("FASTIDC_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastidcError, match=r"no model is named.*FASTIDC_MODEL"):
        Describer()
    monkeypatch.setenv("FASTIDC_MODEL", str(adapted))
    with pytest.raises(FastidcError, match="no captioner"):
        Describer()
