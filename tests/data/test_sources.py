"""Which source of pixels a run reads, and a cache held in memory."""

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from cache_cases import images, made, make_data, make_file, make_world, quiet  # noqa: F401

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc import ops
from fastidc.config import preset
from fastidc.data import sources
from fastidc.data.cache import Cache, default_path
from fastidc.data.images import ImageStore
from fastidc.data.loaders import PairLoader
from fastidc.data.records import load_records
from fastidc.data.sources import CachedImages, choose
from fastidc.errors import FastidcError
from fastidc.tokenizer import Tokenizer


def test_memory_that_is_not_there(data, file, monkeypatch):
    monkeypatch.setattr("fastidc.data.sources.available_bytes", lambda: 1000)
    cache = Cache(file)
    rows = cache.rows(data, images(data))
    with pytest.raises(FastidcError, match=r"all.bin: 42 images are 0.0 GB, and 0.0 GB of memory are free; read them with --loader cache"):
        CachedImages(cache, rows, in_memory=True)
    few = dict(list(rows.items())[5:6])
    held = CachedImages(cache, few, in_memory=True)
    assert held._pixels.shape == (1, 16, 16, 3), "only what a run reads"
    assert np.array_equal(held[next(iter(few))], cache.pixels[5])


def test_locked_memory_stays_locked_while_it_is_read(monkeypatch):
    """And no longer: the driver would keep pages of a source that is gone."""
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):  # noqa: N802
            calls.append(("lock", address, size))
            return 0

        def cudaHostUnregister(self, address):  # noqa: N802
            calls.append(("unlock", address))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    pixels = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    address = pixels.ctypes.data
    locked = sources._page_locked(pixels, Path("x.bin"))
    del pixels
    gc.collect()
    assert calls == [("lock", address, 96)]
    assert locked.data_ptr() == address
    del locked
    gc.collect()
    assert calls[1:] == [("unlock", address)]


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [False, True], ids=["disk", "memory"])
def test_batches_for_a_gpu_are_page_locked(data, file, memory):
    records, cache = load_records(data), Cache(file)
    source = CachedImages(cache, cache.rows(data, images(data)), memory, device="cuda")
    assert torch.from_numpy(source[images(data)[0]].copy()).is_pinned() is False
    assert not memory or source._locked.is_pinned()
    recipe = dataclasses.replace(preset("clevr").finetune, batch_size=5, flip=0.5)
    loaders = [PairLoader("finetune", records["train"], Tokenizer(), pixels, recipe, pinned=True) for pixels in (source, ImageStore(16))]
    for batch, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert other.images.is_pinned()
        if memory:  # which the GPU has fetched by itself, and mirrors where it cuts patches
            assert batch.images.source.is_cuda
            seen = ops.patches(*batch.to("cuda").images.flat()[:2], 4, augmentation=batch.images.augmentation.flatten(0, 1).cuda())
            assert torch.equal(seen.cpu(), ops.patches(other.images.flatten(0, 1), None, 4))
        else:
            assert batch.images.is_pinned()
            assert torch.equal(batch.to(torch.device("cuda")).images.cpu(), other.images)


def test_auto_takes_what_fits_and_says_so(world):
    paths, place = images(world), default_path(world, 16)
    assert choose("auto", None, world, paths, 16).loader == "pillow"
    assert choose("auto", None, world, paths, 16).note is None
    with pytest.raises(FastidcError, match="no such cache"):
        choose("cache", None, world, paths, 16)
    made(world, place)
    assert load_records(world), "a cache in its folder does not disturb a data set"
    for loader, used in (("auto", "cache"), ("cache", "cache"), ("memory", "memory"), ("pillow", "pillow")):
        chosen = choose(loader, None, world, paths, 16)
        assert chosen.loader == used
        assert chosen.open(world, paths, 16, torch.device("cpu")).name.startswith(
            {"cache": "cache on", "memory": "cache in", "pillow": "Pi"}[used]
        )
    assert choose("auto", None, world, paths, 16).note == f"Images come from the cache {place}."
    other = choose("auto", None, world, paths, 32)
    assert (other.loader, other.note.partition(" is not of 32 x 32")[0]) == ("pillow", f"Images are decoded by Pillow: {place.name}")
    for loader in ("auto", "cache"):
        with pytest.raises(FastidcError, match="holds images of 16 x 16, and the model reads 32 x 32; build another cache"):
            choose(loader, place, world, paths, 32)
    with pytest.raises(FastidcError, match="--loader pillow reads no cache, and --cache names"):
        choose("pillow", place, world, paths, 16)
    with pytest.raises(FastidcError, match="--loader is 'wds'"):
        choose("wds", None, world, paths, 16)
    worlds.noise_image(paths[0], seed=3)
    with pytest.raises(FastidcError, match=f"{paths[0]} has changed"):
        choose("cache", None, world, paths, 16)
    stale = choose("auto", None, world, paths, 16)
    assert stale.loader == "pillow"
    assert stale.note.startswith(f"Images are decoded by Pillow: {place}: {paths[0]} has changed")


@pytest.mark.parametrize(
    ("on_device", "on_host", "processes", "loader"),
    [
        (334, 0, 1, "resident"),  # 100 bytes are 30 % of 333.4
        (333, 200, 1, "memory"),
        (333, 199, 1, "cache"),
        (333, 399, 2, "cache"),
        (333, 400, 2, "memory"),
        (0, None, 1, "cache"),
    ],
)
def test_auto_on_a_gpu_takes_the_fastest_place_with_room(monkeypatch, on_device, on_host, processes, loader):
    monkeypatch.setattr(sources, "free_bytes", lambda device: on_device)
    monkeypatch.setattr(sources, "available_bytes", lambda: on_host)
    chosen, why = sources.fitting(100, torch.device("cuda", 0), processes)
    assert chosen == loader
    assert why.endswith(".")
    monkeypatch.setattr(sources, "free_bytes", lambda device: None)
    assert sources.fitting(100, torch.device("cpu"), processes) == ("cache", ".")
