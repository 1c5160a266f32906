"""The cache: its faults, each a sentence, and the same batches whatever they were read from."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from cache_cases import COUNT, beside, images, made, make_data, make_file, make_world, quiet  # noqa: F401
from PIL import Image

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.config import preset
from fastidc.data.cache import HEADER_BYTES, Cache, default_path
from fastidc.data.cache_build import build
from fastidc.data.images import ImageStore, decode
from fastidc.data.loaders import PairLoader, distinct_images, in_order
from fastidc.data.records import load_records
from fastidc.data.sources import CachedImages
from fastidc.errors import FastidcError
from fastidc.tokenizer import Tokenizer

# what is in it


def test_pixels_are_pillows_and_the_index_knows_the_files(data, file):
    cache, paths = Cache(file), images(data)
    assert len(cache.entries) == len(paths) == COUNT
    assert cache.pixels.shape == (COUNT, 16, 16, 3)
    assert not cache.pixels.flags.writeable
    rows = cache.rows(data, paths)
    assert list(rows.values()) == list(range(COUNT)), "in the records' order: a scene's images are neighbours"
    for path, row in rows.items():
        entry = cache.entries[row]
        assert np.array_equal(cache.pixels[row], decode(path, 16))
        assert (entry.path, entry.bytes, entry.verdict) == (path.relative_to(data).as_posix(), path.stat().st_size, "ok")
        assert (entry.mtime_ns, entry.width, entry.height) == (path.stat().st_mtime_ns, 30, 20)
    assert cache.damaged_pixels() == []
    assert beside(file) == ["all.bin"], "nothing but the cache is left"


def test_workers_change_nothing(data, file, tmp_path):
    for workers in (1, 5):
        other = Cache(made(data, tmp_path / f"{workers}.bin", workers=workers).path)
        assert np.array_equal(other.pixels, Cache(file).pixels)
        assert other.entries == Cache(file).entries


def test_images_elsewhere_and_a_moved_data_set(data, file, tmp_path, monkeypatch):
    """Paths are relative to the data set's folder, so it may be moved, or named from another place."""
    data.rename(tmp_path / "moved")
    try:
        cache = Cache(file)
        monkeypatch.chdir(tmp_path)
        for root in (tmp_path / "moved", Path("moved"), Path("moved/../moved")):
            assert list(cache.rows(root, images(root)).values()) == list(range(COUNT))
    finally:
        (tmp_path / "moved").rename(data)
    (tmp_path / "tables").mkdir()
    rows = [{"id": str(n), "before": f"pics/{n}a.png", "after": f"pics/{n}b.png", "caption": "moved", "split": "train"} for n in (1, 2)]
    table = worlds.table_file(tmp_path / "pairs.jsonl", rows).rename(tmp_path / "tables" / "pairs.jsonl")
    found = distinct_images(load_records(table, images=tmp_path).values())
    cache = Cache(build(found, table, tmp_path / "t.bin", 8, report=quiet, progress=False).path)
    assert [entry.path for entry in cache.entries] == ["../pics/1a.png", "../pics/1b.png", "../pics/2a.png", "../pics/2b.png"]
    assert default_path(table, 8) == tmp_path / "tables" / "fastidc-cache-8.bin"


# one batch whatever it was read from


def equal(a, b):
    texts = [None if batch.text is None else batch.text.padded() for batch in (a, b)]
    fields = [(getattr(a, name), getattr(b, name)) for name in ("images", "input_ids", "target_ids")]
    return a.ids == b.ids and all(torch.equal(x, y) if x is not None else y is None for x, y in (*fields, texts))


@pytest.mark.parametrize("memory", [False, True], ids=["disk", "memory"])
@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_batches_are_pillows(data, file, stage, memory):
    records, cache = load_records(data), Cache(file)
    source = CachedImages(cache, cache.rows(data, images(data)), in_memory=memory)
    recipe = dataclasses.replace(preset("clevr").finetune, batch_size=10, seed=5, flip=0.5, swap_distractor=0.5)

    def batches(pixels, workers):
        loader = PairLoader(stage, records["train"], Tokenizer(), pixels, recipe, workers)
        return [batch for epoch in range(2) for batch in loader.epoch(epoch)], loader

    expected, _ = batches(ImageStore(16), 3)
    for workers in (1, 4):
        found, loader = batches(source, workers)
        assert len(found) == len(expected) == (4 if stage == "adapt" else 2)
        assert all(equal(a, b) for a, b in zip(expected, found, strict=True))
    assert any(sample.mirrored for sample in (loader._draw(s, recipe, 0) for s in loader.samples)), "mirrored samples are among them"
    assert loader.meter.images == sum(batch.images.shape[0] * batch.images.shape[1] for batch in found)
    assert re.fullmatch(r"Loader: cache (on disk|in memory), .*all.bin; [\d,]+ images/s, \d+% of the time .*", loader.summary())
    assert loader.meter.images == 0, "a summary is of the time since the last one"
    for a, b in zip(in_order(records["test"], ImageStore(16), 2), in_order(records["test"], source, 2), strict=True):
        assert equal(a, b)


def test_a_gather_is_the_callers_own_and_takes_any_rows(data, file):
    from concurrent.futures import ThreadPoolExecutor

    cache = Cache(file)
    source = CachedImages(cache, cache.rows(data, images(data)))
    rows = [41, 0, 1, 2, 2, 40, 41, *range(42), 7]
    with ThreadPoolExecutor(3) as pool:
        batch = source.gather(rows, pool)()
        assert np.array_equal(batch.numpy(), cache.pixels[rows])
        batch.zero_()
        assert np.array_equal(source.gather(rows, pool)().numpy(), cache.pixels[rows])
        assert source.gather([], pool)().shape == (0, 16, 16, 3)
        for count in (1, 15, 16, 17, 31, 32, 33):
            assert np.array_equal(source.gather(rows[:count], pool)().numpy(), cache.pixels[rows[:count]]), count
        for empty in (source, ImageStore(16)):
            assert len(empty.start([], pool)()) == 0
        with pytest.raises(FastidcError, match=r"other.png: is not among the images that cache on disk"):
            source.start([[Path("other.png")]], pool)
    assert np.array_equal(source[images(data)[3]], cache.pixels[3])


# damage


def test_whatever_is_cut_off_is_noticed(file, tmp_path):
    whole, broken = file.read_bytes(), tmp_path / "cut.bin"
    header = Cache(file).header
    ends = {*range(1, 128, 9), *range(128, len(whole), 997), HEADER_BYTES, header.index_start - 1, header.index_start, len(whole) - 1}
    for end in sorted(ends):
        broken.write_bytes(whole[:end])
        with pytest.raises(FastidcError, match=r"cut.bin: a damaged cache, .*; build it anew with `fastidc cache build`\."):
            Cache(broken)
    broken.write_bytes(whole + b"\0")
    with pytest.raises(FastidcError, match="bytes long instead of"):
        Cache(broken)


def test_one_flipped_byte_in_header_or_index_is_noticed(file, tmp_path):
    whole, broken = file.read_bytes(), tmp_path / "flipped.bin"
    start = Cache(file).header.index_start
    for at in (*range(8, 96), *range(96, HEADER_BYTES, 97), HEADER_BYTES - 1, *range(start, len(whole), 61), len(whole) - 1):
        broken.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FastidcError, match=r"flipped.bin: a damaged cache, its (header|index) does not have the checksum"):
            Cache(broken)
    for at in range(8):
        broken.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FastidcError, match=r"flipped.bin: is no cache of fastidc; name another file"):
            Cache(broken)


def test_a_flipped_pixel_is_found_by_its_checksum(file, tmp_path):
    whole, broken = bytearray(file.read_bytes()), tmp_path / "pixel.bin"
    whole[HEADER_BYTES + 5 * 768 + 100] ^= 1
    broken.write_bytes(whole)
    cache = Cache(broken)
    assert cache.damaged_pixels() == [cache.entries[5].path]


def test_building_again_mends_damaged_pixels(data, file, tmp_path):
    whole, broken = bytearray(file.read_bytes()), tmp_path / "pixel.bin"
    whole[HEADER_BYTES + 5 * 768 + 100] ^= 1
    broken.write_bytes(whole)
    assert made(data, broken).decoded == 1
    assert Cache(broken).damaged_pixels() == []
    assert np.array_equal(Cache(broken).pixels, Cache(file).pixels)
    assert made(data, broken).decoded == 0


def test_foreign_absent_newer_and_unreadable_files(data, file, tmp_path, monkeypatch):
    for content in (b"", b"<html>" * 2000):
        (tmp_path / "foreign.bin").write_bytes(content)
        with pytest.raises(FastidcError, match=r"foreign.bin: is no cache of fastidc"):
            Cache(tmp_path / "foreign.bin")
        with pytest.raises(FastidcError, match=r"foreign.bin: exists and is no cache of fastidc; choose another --out, or delete it"):
            made(data, tmp_path / "foreign.bin")
        assert (tmp_path / "foreign.bin").read_bytes() == content
    with pytest.raises(FastidcError, match=r"gone.bin: no such cache; make it with `fastidc cache build --data DATA --out"):
        Cache(tmp_path / "gone.bin")
    with pytest.raises(FastidcError, match=r": cannot be read \(Is a directory\)"):
        Cache(tmp_path)
    with pytest.raises(FastidcError, match="a folder; name the file with --out"):
        made(data, tmp_path)
    monkeypatch.setattr("fastidc.data.cache.VERSION", 2)
    newer = made(data, tmp_path / "newer.bin").path
    monkeypatch.undo()
    with pytest.raises(FastidcError, match="is a cache of format 2, and this fastidc reads format 1"):
        Cache(newer)


@pytest.mark.parametrize("damage", ["cut", "index"])
def test_a_damaged_cache_is_built_anew(data, file, tmp_path, damage):
    whole, out, heard = file.read_bytes(), tmp_path / "out.bin", []
    out.write_bytes(whole[:-7] if damage == "cut" else whole[:-7] + b"0000000")
    assert made(data, out, heard=heard.append).decoded == COUNT
    assert "out.bin is replaced: " in heard[0]
    assert np.array_equal(Cache(out).pixels, Cache(file).pixels)


# changed images


def test_changed_images_are_named_and_alone_decoded_again(world, tmp_path):
    out, paths = tmp_path / "c.bin", images(world)
    assert made(world, out).decoded == COUNT
    assert made(world, out).decoded == 0
    before = Cache(out)
    rows = before.rows(world, paths)
    before.check_fresh(world, rows)
    os.utime(paths[4], ns=(1, 1))
    before.check_fresh(world, rows)  # another mtime, the same bytes
    same_size = bytearray(paths[7].read_bytes())
    worlds.noise_image(paths[7], seed=9, size=(30, 20))
    longer = paths[7].read_bytes()
    paths[7].write_bytes(bytes(same_size))
    for change in (lambda: paths[7].write_bytes(longer), lambda: paths[9].unlink()):
        change()
        with pytest.raises(FastidcError, match=rf"c.bin: {paths[7]}.* changed since it was built; build it anew with `fastidc cache build"):
            before.check_fresh(world, rows)
    with pytest.raises(FastidcError, match="and 1 more have changed"):
        before.check_fresh(world, rows)
    worlds.noise_image(paths[9], seed=10)
    heard = []
    assert made(world, out, heard=heard.append).decoded == 2
    assert f"{COUNT - 2} of {COUNT} images are taken from the cache that was there" in heard[0]
    after = Cache(out)
    after.check_fresh(world, rows)
    assert after.entries[4].mtime_ns == 1, "what was only touched need not be read again"
    assert all(np.array_equal(after.pixels[row], decode(path, 16)) for path, row in rows.items())
    assert np.array_equal(before.pixels[7], before.pixels[7]), "who has the old one open still reads it"
    assert not np.array_equal(before.pixels[7], after.pixels[7])


def test_the_same_size_and_other_bytes_is_a_change(world, tmp_path):
    paths = images(world)
    for name, seed in (("a", 1), ("b", 2)):
        Image.fromarray(np.full((4, 4, 3), seed, np.uint8)).save(tmp_path / f"{name}.bmp")
    paths[0].write_bytes((tmp_path / "a.bmp").read_bytes())
    cache = Cache(made(world, tmp_path / "c.bin").path)
    paths[0].write_bytes((tmp_path / "b.bmp").read_bytes())
    os.utime(paths[0], ns=(1, 1))
    with pytest.raises(FastidcError, match=f"{paths[0]} has changed"):
        cache.check_fresh(world, cache.rows(world, paths))


def test_a_data_set_that_has_grown(world, tmp_path):
    out = tmp_path / "c.bin"
    some = images(world)[:30]
    build(some, world, out, 16, report=quiet, progress=False)
    with pytest.raises(FastidcError, match=r"c.bin: does not hold .*000020.png nor 11 more; build it anew"):
        Cache(out).rows(world, images(world))
    assert made(world, out).decoded == COUNT - 30
    assert made(world, out, size=8).decoded == COUNT, "another size is another cache"
