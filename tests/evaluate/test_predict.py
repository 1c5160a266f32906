"""A model over a split: what it says and where each caption goes, and the next batch read meanwhile."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
import worlds

from fastidc.config import END_ID, PAD_ID, PRESETS, START_ID
from fastidc.data.images import ImageStore
from fastidc.data.records import load_records
from fastidc.errors import FastidcError
from fastidc.evaluate.predict import _ready, embed_pairs, predict_captions, references_of
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import Tokenizer
from fastidc.train.distributed import ALONE
from fastidc.train.judge import Judge
from fastidc.train.precision import Precision

VOCABULARY = tuple(sorted({PAD_ID, START_ID, END_ID, *range(300, 400)}))
CONFIG = worlds.SMALL.replace(vocabulary=VOCABULARY, vocab_size=len(VOCABULARY))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return load_records(
        worlds.clevr_tree(tmp_path_factory.mktemp("clevr") / "data", {"train": [0], "val": [1], "test": list(range(2, 9))})
    )["test"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG).double().eval()  # so that no rounding decides between words
    with torch.no_grad():
        model.text_encoder.token_embedding.mul_(20)
        model.text_encoder.position.mul_(100)
        for p in model.captioner.parameters():
            p.mul_(3)
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_of_a_split(model, records, beams):
    """Whatever the batch size: those of each pair by itself, in the references' order."""
    images, tokenizer = ImageStore(CONFIG.image_size), Tokenizer.of(CONFIG)
    expected = {}
    for record in records:
        before, after, distractor = (torch.from_numpy(np.array(images[path])).permute(2, 0, 1)[None] for path in record.images)
        for name, other in ((record.id, after), (record.no_change_id, distractor)):
            expected[name] = tokenizer.decode(model.generate(before, other, 10, beams)[0].tolist())
    for size in (2, 64):
        found = predict_captions(model, tokenizer, records, images, batch_size=size, max_length=10, beams=beams)
        assert found == expected
        assert list(found) == list(references_of(records))
    assert len(set(expected.values())) > 3
    judge = Judge(
        "finetune",
        model,
        tokenizer,
        images,
        dataclasses.replace(PRESETS["clevr"].finetune, max_words=10),
        ALONE,
        Precision("fp32", "cpu"),
        3,
        beams=beams,
    )
    assert judge.captions(records) == expected


def test_the_next_batch_is_put_together_meanwhile(records):
    """While the first batch is in use, with nothing more asked for, every image of the second is read."""
    before = threading.enumerate()
    read, lock, second = set(), threading.Lock(), threading.Event()

    class Store(ImageStore):
        def __getitem__(self, path):
            image = super().__getitem__(path)
            with lock:
                read.add(path)
                if len(read) >= 2 * 2 * 3:
                    second.set()
            return image

    batches = _ready(records, Store(16), 2, pinned=False)
    assert next(batches).ids == [r.id for r in records[:2]]
    assert second.wait(30)
    assert [name for batch in batches for name in batch.ids] == [r.id for r in records[2:]]
    assert set(threading.enumerate()) <= set(before)


def test_leaving_early_ends_the_readers(records):
    before = threading.enumerate()
    batches = _ready(records, ImageStore(16), 1, pinned=False)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= set(before)


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_broken_image_is_named(model, records, at, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    some = [*records[:at], dataclasses.replace(records[at], after=broken), *records[at + 1 :]]
    with pytest.raises(FastidcError, match=r"broken.png: cannot be read as an image \("):
        embed_pairs(model, some, ImageStore(CONFIG.image_size), batch_size=2)
