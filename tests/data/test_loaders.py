"""Batches: pixels as the official code sees them, draws that depend on nothing but their keys."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import worlds
from PIL import Image

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.config import preset
from fastidc.data.images import ImageStore, decode
from fastidc.data.loaders import PairLoader, adaptation_samples, ahead, draw_adaptation, draw_captioning, epoch_order, in_order
from fastidc.data.random import briefly, generator
from fastidc.data.records import load_records
from fastidc.errors import FastidcError
from fastidc.tokenizer import Tokenizer, left_right_swapped

RECIPE = dataclasses.replace(preset("clevr").finetune, batch_size=4, seed=5)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    splits = {"train": list(range(10)), "val": [20], "test": [30, 31, 32]}
    return load_records(worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", splits))


def batches(records, stage, recipe, workers=4, epoch=0, store=None):
    loader = PairLoader(stage, records["train"], Tokenizer(), store or ImageStore(16), recipe, workers)
    return list(loader.epoch(epoch))


def equal(a, b):
    texts = [None if batch.text is None else batch.text.padded() for batch in (a, b)]
    fields = [(getattr(a, name), getattr(b, name)) for name in ("images", "input_ids", "target_ids")]
    return a.ids == b.ids and all(torch.equal(x, y) if x is not None else y is None for x, y in (*fields, texts))


def test_decode_squashes_with_pils_bicubic(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(pixels).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(tmp_path / "a.png", 16), expected)
    assert not np.array_equal(decode(tmp_path / "a.png", 16)[:, :, 0], decode(tmp_path / "a.png", 16)[:, :, 1])


@pytest.mark.parametrize("content", [b"", b"<html></html>", "cut"])
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    if content == "cut":
        Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
        content = (tmp_path / "good.png").read_bytes()[:60]
    path.write_bytes(content)
    with pytest.raises(FastidcError, match=r"bad.png: cannot be read as an image"):
        decode(path, 16)
    with pytest.raises(FastidcError, match=r"gone.png: no such image"):
        decode(tmp_path / "gone.png", 16)


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_workers_and_memory_change_nothing(records, stage):
    recipe = dataclasses.replace(RECIPE, flip=0.5, swap_distractor=0.5)
    expected = batches(records, stage, recipe, workers=1, store=ImageStore(16, max_bytes=0))
    store = ImageStore(16, max_bytes=5 * 16 * 16 * 3)
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(expected, batches(records, stage, recipe, workers=5, store=store), strict=True))
    assert not equal(expected[0], batches(records, stage, recipe, epoch=1)[0]), "another epoch, another order"
    other = dataclasses.replace(recipe, seed=6)
    assert not equal(expected[0], batches(records, stage, other)[0]), "another seed, another order"


def test_shapes_and_contents(records):
    (first, *_) = batches(records, "finetune", RECIPE)
    assert first.images.shape == (4, 3, 16, 16, 3)
    assert first.images.dtype == torch.uint8
    by_id = {r.id: r for r in records["train"]}
    t = Tokenizer()
    for i, name in enumerate(first.ids):
        record = by_id[name]
        for k, path in enumerate(record.images):
            assert np.array_equal(first.images[i, k].numpy(), decode(path, 16))
        change, none = (t.decode(row) for row in first.target_ids[i, :, 0].tolist())
        assert change in record.captions
        assert none in record.no_change_captions
        assert first.input_ids[i, 0, 0, 0] == t.start
        length = int((first.target_ids[i, 0, 0] != 0).sum())
        assert first.input_ids[i, 0, 0, 1:length].tolist() == first.target_ids[i, 0, 0, : length - 1].tolist()
    assert batches(records, "adapt", RECIPE)[0].images.shape == (4, 2, 16, 16, 3)


def test_an_epoch_sees_every_sample_once(records):
    assert len(adaptation_samples(records["train"])) == 20
    names = [name for batch in batches(records, "adapt", RECIPE) for name in batch.ids]
    assert len(names) == len(set(names)) == 20
    assert sorted(epoch_order(1000, 3, 1)) == list(range(1000))
    assert len(batches(records, "finetune", RECIPE)) == 2, "the incomplete last batch is left out"


def test_distractor_stands_in_half_the_time(records):
    samples = adaptation_samples(records["train"])
    recipe = dataclasses.replace(RECIPE, swap_distractor=0.5)
    drawn = [draw_adaptation(s, recipe, epoch) for s in samples for epoch in range(100)]
    share = sum("nonsemantic" in s.images[0].name for s in drawn) / len(drawn)
    assert abs(share - 0.5) < 0.04
    never = dataclasses.replace(RECIPE, swap_distractor=0.0)
    assert not any("nonsemantic" in draw_adaptation(s, never, 0).images[0].name for s in samples)


def test_mirrored_pairs_have_mirrored_captions(records):
    always, never = (dataclasses.replace(RECIPE, flip=p) for p in (1.0, 0.0))
    record = records["train"][0]
    plain, mirrored = draw_captioning(record, never, 0), draw_captioning(record, always, 0)
    assert mirrored.captions == tuple(left_right_swapped(c) for c in plain.captions)
    a, b = batches(records, "finetune", never)[0], batches(records, "finetune", always)[0]
    assert torch.equal(a.images.flip(3), b.images)


def test_captions_are_drawn_uniformly(records):
    record = records["train"][0]
    drawn = [draw_captioning(record, RECIPE, epoch).captions for epoch in range(400)]
    for k, sentences in enumerate((record.captions, record.no_change_captions)):
        share = sum(captions[k] == sentences[0] for captions in drawn) / 400
        assert abs(share - 0.5) < 0.1


def test_several_captions_of_a_pair(records):
    recipe = dataclasses.replace(RECIPE, captions_per_pair=3)
    (first, *_) = batches(records, "finetune", recipe)
    assert first.target_ids.shape[:3] == (4, 2, 3)
    by_id, t = {r.id: r for r in records["train"]}, Tokenizer()
    for name, rows in zip(first.ids, first.target_ids.tolist(), strict=True):
        for sentences, captions in zip((by_id[name].captions, by_id[name].no_change_captions), rows, strict=True):
            texts = [t.decode(row) for row in captions]
            assert set(texts) == set(sentences), "both sentences that there are, one of them twice"
            assert len(set(texts[:2])) == 2


def test_generator_is_frozen():
    """The streams may never change: a resumed or repeated run depends on them."""
    assert generator(5, "adapt", 3, "000001.png#0").integers(0, 1 << 30, 3).tolist() == FROZEN


FROZEN = [685401272, 675778462, 218608437]


def test_evaluation_order_is_the_files(records):
    seen = [name for batch in in_order(records["test"], ImageStore(16), 2) for name in batch.ids]
    assert seen == [r.id for r in records["test"]]


def test_refusals(records):
    with pytest.raises(FastidcError, match="the training split has 10 samples, fewer than one batch of 16; lower the batch size"):
        PairLoader("finetune", records["train"], Tokenizer(), ImageStore(16), dataclasses.replace(RECIPE, batch_size=16))
    mixed = [records["train"][0], dataclasses.replace(records["train"][1], distractor=None)]
    with pytest.raises(FastidcError, match="some scenes have a distractor and some have none"):
        PairLoader("finetune", mixed, Tokenizer(), ImageStore(16), dataclasses.replace(RECIPE, batch_size=1))


def test_a_borrowed_stream_is_the_same_stream():
    """Whatever was drawn from it before, and in every thread of its own."""
    keys = [(seed, "adapt", epoch, f"{name}#1") for seed in (0, 7) for epoch in (0, 3) for name in ("a", "é")]

    def drawn(key):
        stream = briefly(*key)
        stream.integers(0, 9)
        return (*briefly(*key).random(3), *briefly(*key).permutation(9), int(briefly(*key).integers(0, 1 << 24)))

    want = [(*generator(*key).random(3), *generator(*key).permutation(9), int(generator(*key).integers(0, 1 << 24))) for key in keys]
    assert [drawn(key) for key in keys] == want
    assert len(set(want)) == len(keys)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(drawn, keys * 50)) == want * 50


def test_a_signal_while_a_batch_is_being_made_is_what_surfaces(monkeypatch):
    """It ends the wait for the thread, which is still at work on the batches."""
    begun, go = threading.Event(), threading.Event()

    def batches():
        yield SimpleNamespace(images=torch.zeros(1, 2))
        begun.set()
        go.wait(30)

    coming = ahead(batches())
    next(coming)
    assert begun.wait(30)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", lambda self, wait=True, **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        coming.close()
    go.set()
