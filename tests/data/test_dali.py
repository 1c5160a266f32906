"""DALI on the CPU: the batches of Pillow's loader, whatever the files are."""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import worlds
from cache_cases import SPLITS, images
from dali_cases import bad, close, encoded, kinds, soft, soften
from PIL import Image

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")
pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")

import nvidia.dali as dali_package

from fastidc.config import preset
from fastidc.data import dali
from fastidc.data.dali import DaliImages
from fastidc.data.dali_pipeline import DaliError, Pipelines, require, squash_on, takes
from fastidc.data.images import ImageStore, check_file, decode
from fastidc.data.loaders import PairBatch, PairLoader, draw_captioning, epoch_order, in_order, prefetch
from fastidc.data.records import load_records
from fastidc.data.sources import choose
from fastidc.errors import FastidcError
from fastidc.tokenizer import Tokenizer

SIZE = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", SPLITS)
    soften(root)
    return root


@pytest.fixture(scope="module")
def source():
    return DaliImages(SIZE, squash="dali", threads=1, most=4)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as threads:
        yield threads


# the batches of Pillow's loader


def recipe_of(stage):
    return dataclasses.replace(getattr(preset("clevr"), stage), batch_size=5, seed=5, flip=0.5, swap_distractor=0.5)


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_batches_are_pillows(data, source, stage):
    records, recipe = load_records(data), recipe_of(stage)

    def batches(pixels):
        loader = PairLoader(stage, records["train"], Tokenizer(), pixels, recipe, 2)
        return [batch for epoch in range(2) for batch in loader.epoch(epoch)]

    expected, found = batches(ImageStore(SIZE)), batches(source)
    assert len(found) == len(expected) == (8 if stage == "adapt" else 4)
    for a, b in zip(expected, found, strict=True):
        assert a.ids == b.ids
        assert close(b.images, a.images), "a mirrored sample would be far off"
        if stage == "adapt":
            assert torch.equal(a.text.padded(), b.text.padded())
        else:
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.target_ids, b.target_ids)
    assert not all(torch.equal(a.images, b.images) for a, b in zip(expected, found, strict=True)), "they are DALI's pixels"
    for a, b in zip(in_order(records["test"], ImageStore(SIZE), 2), in_order(records["test"], source, 2), strict=True):
        assert a.ids == b.ids
        assert close(b.images, a.images)


def test_beginning_at_a_batch_gives_the_bytes_of_going_on(data):
    """There is nothing to save: order and draws are functions of (seed, epoch, position), and a source has no order of its own."""
    records, recipe = load_records(data)["train"] * 3, dataclasses.replace(recipe_of("finetune"), flip=0)
    whole = list(PairLoader("finetune", records, Tokenizer(), DaliImages(SIZE, threads=1), recipe, 2).epoch(1))
    order = epoch_order(len(records), recipe.seed, 1)
    for k in (1, 4):
        fresh = DaliImages(SIZE, threads=2, most=3)
        chunks = [order[i : i + 5] for i in range(k * 5, len(whole) * 5, 5)]
        drawn = ([draw_captioning(records[i], recipe, 1) for i in chunk] for chunk in chunks)
        rest = list(prefetch(drawn, lambda samples, pixels: PairBatch(pixels, [sample.id for sample in samples]), fresh, 1))
        assert [batch.ids for batch in rest] == [batch.ids for batch in whole[k:]]
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[k:], strict=True))


def test_batches_of_any_size_from_several_threads(data, source, pool, monkeypatch):
    paths = images(data)
    samples = [paths[i : i + 3] for i in range(0, 36, 3)]
    whole = source.start(samples, pool)()
    assert whole.shape == (12, 3, SIZE, SIZE, 3)
    assert whole.dtype == torch.uint8
    sizes = [1, 4, 3, 9, 2, 12, 5] * 3
    waits = [source.start(samples[:size], pool) for size in sizes]  # far more than anybody waits for at a time
    for size, wait in list(zip(sizes, waits, strict=True))[::-2]:
        assert torch.equal(wait(), whole[:size]), "in any order, and some never"
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda k: source.start([sample[:k] for sample in samples], pool)(), [1, 2, 3, 2, 1, 3] * 2))
    assert all(torch.equal(x, whole[:, : x.shape[1]]) for x in found)
    monkeypatch.setattr(dali, "_LARGEST_RUN", 4 * 3 * 96 * 64)
    assert [part.stop - part.start for part in source._parts([dali.Encoded(None, b"", 96, 64)] * 10, 2)] == [4, 4, 2]
    assert torch.equal(source.start(samples, pool)(), whole), "large pictures go a few at a time"
    whole[0] = 0
    assert source.start(samples[:1], pool)().any(), "a batch is the caller's own"


@pytest.mark.parametrize("squash", ["auto", "kernel"])
def test_squashed_by_pillow_or_our_kernel_they_are_pillows_bits(data, tmp_path, pool, squash):
    paths = images(data)[:6]
    for number, (width, height) in enumerate(((1, 1), (300, 3), (9, 250), (SIZE, SIZE), (40, 100))):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    source = DaliImages(SIZE, threads=2, squash=squash, most=4)
    assert source.name.endswith(f"on the CPU, squashed by {'Pillow' if squash == 'auto' else 'our kernel'}")
    found = source.start([[path] for path in paths], pool)()
    assert all(np.array_equal(pixels[0], decode(path, SIZE)) for pixels, path in zip(found, paths, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("squash", ["dali", "auto"])
def test_on_a_gpu_batches_lie_there(data, tmp_path, pool, squash):
    """PNG is decoded on the host, so that our kernel makes Pillow's bits of it; nvJPEG rounds otherwise. Bad files as on a CPU."""
    source, paths = DaliImages(SIZE, "cuda", squash, threads=2, most=4), images(data)
    (tmp_path / "x.gif").write_bytes(kinds(SIZE)["gif"][0])
    paths.append(tmp_path / "x.gif")
    found = source.start([[path] for path in paths], pool, pinned=True)()
    assert found.is_cuda
    for path, pixels in zip(paths, found[:, 0].cpu().numpy(), strict=True):
        expected = decode(path, SIZE)
        if path.parent.name == "sc_images":
            assert np.abs(pixels.astype(np.int16) - expected).mean() < 2
        else:
            assert np.array_equal(pixels, expected) if source.squash == "kernel" else close(pixels, expected)
    (tmp_path / "bad.png").write_bytes(bad()["png with damage"])
    with pytest.raises(FastidcError, match=r"bad.png: cannot be read as an image"):
        source.start([[paths[0]], [tmp_path / "bad.png"]], pool)()
    assert torch.equal(source.start([[path] for path in paths[:7]], pool)(), found[:7])


def test_a_sample_that_comes_back_elsewhere_is_noticed(data, pool, monkeypatch):
    source = DaliImages(SIZE, threads=1)
    real = Pipelines._built

    class Swapped:
        def __init__(self, pipeline):
            self.feed_input, self.pipeline = pipeline.feed_input, pipeline

        def run(self):
            *pixels, _ = self.pipeline.run()
            return (*pixels, type("Ids", (), {"as_array": staticmethod(lambda: np.array([[3], [2]]))}))

    monkeypatch.setattr(Pipelines, "_built", lambda self, count: Swapped(real(self, count)))
    with pytest.raises(FastidcError, match=r"DALI gave back samples .* were due; report it, or read the images with Pillow"):
        source.start([[path] * 2 for path in images(data)[:2]], pool)()


# files of every kind


def test_files_of_every_kind(source, pool, tmp_path):
    """Decoded by DALI as by Pillow, EXIF's orientation left alone; or by Pillow itself."""
    files = kinds(SIZE)
    for number, (content, _) in enumerate(files.values()):
        (tmp_path / str(number)).write_bytes(content)
    paths = [tmp_path / str(number) for number in range(len(files))]
    found = source.start([paths[i : i + 2] for i in range(0, len(paths), 2)], pool)().flatten(0, 1)
    for (name, (content, by_dali)), pixels, path in zip(files.items(), found, paths, strict=True):
        assert bool(takes(content)) is by_dali, name
        expected = decode(path, SIZE)
        assert close(pixels, expected) if by_dali else np.array_equal(pixels, expected), name
    assert not source._by_pillow


def test_half_a_jpeg_that_ends_as_one_is_what_it_is_to_pillow(data, source, pool, tmp_path):
    """Both fill it up with grey. Its neighbours keep their bytes."""
    path, good, whole = tmp_path / "half.jpg", images(data), encoded(soft(1), "JPEG", quality=95)
    path.write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    before = source.start([[good[0], good[1]], [good[2], good[3]]], pool)()
    found = source.start([[good[0], good[1]], [path, good[3]]], pool)()
    assert close(found[1, 0], decode(path, SIZE))
    assert torch.equal(found[0], before[0])
    assert torch.equal(found[1, 1], before[1, 1])


@pytest.mark.parametrize("name", bad())
def test_one_bad_image_is_named_as_pillow_names_it(data, source, pool, tmp_path, name):
    path, good = tmp_path / "bad.png", images(data)
    path.write_bytes(bad()[name])
    samples = [[good[0], good[1]], [good[2], path], [good[3], good[4]]]
    before = source.start([samples[0], samples[2]], pool)()
    with pytest.raises(FastidcError) as refusal:
        decode(path, SIZE)
    for _ in range(2):
        with pytest.raises(FastidcError) as said:
            source.start(samples, pool)()
        assert str(said.value) == str(refusal.value)
    if name in ("empty", "html", "truncated png", "header alone"):
        with pytest.raises(FastidcError):
            check_file(path)
    assert torch.equal(source.start([samples[0], samples[2]], pool)(), before), "the next batch is whole"
    for gone in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(FastidcError) as said:
            source.start([[gone]], pool)()
        with pytest.raises(FastidcError) as refusal:
            decode(gone, SIZE)
        assert str(said.value) == str(refusal.value)


def test_what_dali_alone_refuses_is_pillows(data, pool, monkeypatch):
    """Its neighbours keep DALI's pixels, and later batches do not try again."""
    paths, runs = images(data)[:8], []
    source = DaliImages(SIZE, threads=1, squash="dali")
    expected = source.start([paths], pool)()
    refused, real = paths[5].read_bytes(), Pipelines.run

    def run(self, samples, out):
        runs.append(len(samples))
        if any(data == refused for sample in samples for data in sample):
            raise DaliError("no")
        real(self, samples, out)

    monkeypatch.setattr(Pipelines, "run", run)
    found = source.start([paths], pool)()
    assert np.array_equal(found[0, 5], decode(paths[5], SIZE))
    assert torch.equal(found[0, :5], expected[0, :5])
    assert torch.equal(found[0, 6:], expected[0, 6:])
    assert len(runs) > 3
    runs.clear()
    assert torch.equal(source.start([paths], pool)(), found)
    assert runs == [1]


def test_a_dali_that_decodes_nothing_does_not_blame_the_files(data, pool, monkeypatch):
    source = DaliImages(SIZE, threads=1)

    def run(self, samples, out):
        raise DaliError("out of memory")

    monkeypatch.setattr(Pipelines, "run", run)
    for attempt in (lambda: source.start([images(data)[:2]], pool)(), lambda: DaliImages(SIZE)):
        with pytest.raises(FastidcError, match=r"DALI .* decodes nothing here \(out of memory\); read the images with Pillow"):
            attempt()


@pytest.mark.slow
def test_damage_at_random(tmp_path, pool):
    """Where DALI takes a damaged file, it gives Pillow's pixels; where it does not, Pillow's sentence."""
    draw, path, source = np.random.default_rng(0), tmp_path / "x.png", DaliImages(SIZE, threads=1)
    for number in range(600):
        content = bytearray(encoded(soft(number % 7), ("PNG", "JPEG")[number % 2]))
        if number % 5:
            for place in draw.integers(0, len(content), draw.integers(1, 4)):
                content[place] = draw.integers(0, 256)
        else:
            del content[draw.integers(1, len(content)) :]
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        answers = []
        for read in (lambda path: decode(path, SIZE), lambda path: source.start([[path]], pool)()[0, 0].numpy()):
            try:
                answers.append(read(path))
            except FastidcError as refusal:
                answers.append(str(refusal))
        assert np.array_equal(answers[0], answers[1]), number


# where it is absent


def test_absent_broken_or_for_another_cuda_is_a_sentence(data, monkeypatch):
    monkeypatch.setattr(dali_package, "__cuda_version__", 12040)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(FastidcError, match=r"DALI .* is built for CUDA 12 and torch for CUDA 13; install nvidia-dali-cuda130, or read"):
        require(torch.device("cuda", 0))
    assert require(torch.device("cpu")) == dali_package.__version__
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(FastidcError, match=r"DALI is not installed; `pip install 'fastidc\[cuda13\]'` brings it .*--loader pillow"):
        choose("dali", None, data, images(data), SIZE)
    assert choose("auto", None, data, images(data), SIZE).loader == "pillow"


def test_choosing_it(data, tmp_path):
    chosen = choose("dali", None, data, images(data), SIZE, workers=2)
    assert (chosen.loader, chosen.decodes, chosen.note) == ("dali", True, None)
    opened = chosen.open(data, images(data), SIZE, torch.device("cpu"))
    assert (opened.size, opened._pipelines.threads) == (SIZE, 2)
    with pytest.raises(FastidcError, match="--loader dali reads no cache, and --cache names"):
        choose("dali", tmp_path / "c.bin", data, images(data), SIZE)
    with pytest.raises(FastidcError, match="squash is 'nearest'"):
        DaliImages(SIZE, squash="nearest")
    with pytest.raises(FastidcError, match="squash is 'pillow', which is for pixels on the host"):
        squash_on(torch.device("cuda", 0), "pillow")
