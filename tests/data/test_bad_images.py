"""Bad image files: Pillow's loader, DALI's and a cache say the same of each, and nothing hangs."""

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bad_images
import numpy as np
import pytest
import torch
import worlds
from PIL import Image, ImageFile

from fastidc.data import images, limits, patience
from fastidc.data.cache import Cache
from fastidc.data.cache_build import build
from fastidc.data.check_images import look, look_at_all
from fastidc.data.images import ImageStore, check_file, decode
from fastidc.data.limits import shown
from fastidc.data.loaders import check_images
from fastidc.data.patience import Pool, SlowImageError
from fastidc.data.sources import choose
from fastidc.errors import FastidcError

SIZE = 32
try:
    from fastidc.data.dali import DaliImages

    SOURCES = {"pillow": ImageStore(SIZE), "dali": DaliImages(SIZE, "cpu", threads=1)}
except (FastidcError, ModuleNotFoundError):  # without DALI the cache is compared with Pillow all the same
    SOURCES = {"pillow": ImageStore(SIZE)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return bad_images.make(tmp_path_factory.mktemp("bad") / "images")


def said_of(read):
    """What ``read()`` gives, or the sentence that it refuses with."""
    try:
        return read()
    except FastidcError as refusal:
        return str(refusal)


@pytest.fixture(scope="module")
def verdicts(files):
    """name -> pixels or sentence, of Pillow's loader."""
    with warnings.catch_warnings(), Pool(1) as pool:
        warnings.simplefilter("error")  # none may be heard
        return {name: said_of(lambda path=path: SOURCES["pillow"].start([[path]], pool)()[0, 0].numpy()) for name, path in files.items()}


def test_what_pillows_loader_says(files, verdicts):
    assert len(files) >= 60
    for name, verdict in verdicts.items():
        if name.startswith(bad_images.EITHER):
            continue
        good = name in bad_images.GOOD | bad_images.TINY
        assert isinstance(verdict, np.ndarray) is good, (name, verdict)
        if not good:
            assert verdict.startswith(f"{shown(files[name])}: "), name
            assert verdict.encode(), "every terminal and file takes it"
    for name, what in (
        ("pipe.png", "is a named pipe and no file"),
        ("folder.png", "is a folder and no file"),
        ("device.png", "is a device and no file"),
        ("long.png", "is 269,484,032 bytes long, more than the 268,435,456 that are read"),
        ("bomb.png", r"exceeds limit of 178956970 pixels"),
        ("bomb.ico", r"exceeds limit of 178956970 pixels"),
        ("unreadable.png", "Input/output error"),
        ("missing.png", "no such image"),
        ("dangling.png", "no such image"),
        ("not utf-8, bad \udcff.png", r"bad \udcff.png: cannot be read as an image"),
    ):
        assert what in verdicts[name]


@pytest.mark.skipif("dali" not in SOURCES, reason="DALI is not installed: pip install nvidia-dali-cuda130")
def test_dali_says_the_same(files, verdicts):
    with Pool(1) as pool:
        for name, path in files.items():
            found = said_of(lambda path=path: SOURCES["dali"].start([[path]], pool)()[0, 0].numpy())
            assert np.array_equal(found, verdicts[name]), name


@pytest.mark.parametrize("builder", SOURCES)
def test_a_cache_says_the_same(files, verdicts, tmp_path, builder):
    """Every sentence is heard, and what has none is in the cache."""
    heard, how = [], {"size": SIZE, "builder": builder, "progress": False, "workers": 1}
    bad = [name for name, verdict in verdicts.items() if isinstance(verdict, str)]
    with pytest.raises(FastidcError, match=rf"{len(bad)} of {len(files)} images, named above, cannot be decoded"):
        build(list(files.values()), tmp_path, tmp_path / "all.bin", report=heard.append, **how)
    assert heard == [verdicts[name] for name in bad]
    good = [name for name in files if name not in bad]
    cache = Cache(build([files[name] for name in good], tmp_path, tmp_path / "good.bin", report=heard.append, **how).path)
    for name, pixels in zip(good, cache.pixels, strict=True):
        assert np.array_equal(pixels, verdicts[name]), name


def test_the_look_says_the_same(files, verdicts):
    seen = look_at_all(files.values(), "full", 1, progress=False)
    for name, path in files.items():
        bad = bool(seen[path].kind) and seen[path].level == "bad"
        assert bad is (isinstance(verdicts[name], str) or name in bad_images.TINY), name
    assert {seen[files[name]].kind for name in ("pipe.png", "folder.png", "device.png")} == {"image-foreign"}
    assert seen[files["pipe.png"]].what == "is a named pipe and no file"
    assert {seen[files[name]].kind for name in ("long.png", "bomb.png", "bomb.gif")} == {"image-bomb"}
    assert seen[files["zero\0.png"]].kind == "image-missing"


def test_the_quick_look_refuses_what_is_no_file(files):
    for name in ("pipe.png", "folder.png", "device.png", "long.png", "missing.png", "loop.png"):
        with pytest.raises(FastidcError):
            check_file(files[name])
        with pytest.raises(FastidcError, match=r"[.]png"):
            check_images([files["grey.png"], files[name]], 2)


# the limits are ours


def test_what_a_program_has_set_of_pillow_changes_nothing_and_stays(files, verdicts, monkeypatch):
    for pixels, cut in ((10, True), (None, True), (10**12, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", cut)
        for name in ("grey.png", "bomb.png", "cut 9.png", "cut 9.jpg"):
            found = said_of(partial(decode, files[name], SIZE))
            assert np.array_equal(found, verdicts[name]), name
            assert bool(look(files[name]).kind) is isinstance(verdicts[name], str)
        assert (pixels, cut) == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_pillows_warning_of_large_images_is_not_heard_but_by_the_user(tmp_path, monkeypatch):
    path = worlds.noise_image(tmp_path / "large.png", size=(30, 20))
    monkeypatch.setattr(limits, "LARGE_PIXELS", 500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(path, 8).shape == (8, 8, 3)
        check_file(path)
        assert look(path).kind == "image-large"
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(path)  # the user's own
    assert warnings.filters == before


def test_threads_leave_the_limits_one_by_one(files, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 77)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with limits.guarded():
            inside.set()
            leave.wait()

    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        inside.wait()
        decode(files["grey.png"], SIZE)
        found = Image.MAX_IMAGE_PIXELS
        leave.set()
        staying.result()
    assert found == limits.LARGE_PIXELS, "the other thread was still inside"
    assert Image.MAX_IMAGE_PIXELS == 77


def test_a_plugin_that_fails_is_a_sentence(files, monkeypatch):
    def fail(image, size):
        raise KeyError("bits")

    monkeypatch.setattr(images, "to_array", fail)
    with pytest.raises(FastidcError, match=r"grey.png: cannot be read as an image \(Pillow fails with KeyError: 'bits'\); replace"):
        decode(files["grey.png"], SIZE)


# patience


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A file that takes until the test is over, among good ones; patience is a moment."""
    release, real = threading.Event(), limits.content
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    monkeypatch.setattr(patience, "_LOOK", 0.02)

    def content(file):
        if "hangs" in file.name:
            release.wait(20)
        return real(file)

    monkeypatch.setattr(limits, "content", content)
    yield [worlds.noise_image(tmp_path / f"{name}.png") for name in ("first", "hangs", "last")]
    release.set()


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_that_never_comes_ends_the_wait(hanging, source):
    with pytest.raises(SlowImageError, match=r"hangs.png: is not read after 0.2 s; the disk is slow or hangs, or") as end, Pool(2) as pool:
        SOURCES[source].start([[hanging[0], hanging[1]], [hanging[2], hanging[0]]], pool)()
    assert isinstance(end.value, FastidcError)


def test_looks_and_caches_do_not_wait_either(hanging, tmp_path):
    out = tmp_path / "c.bin"
    for attempt in (
        lambda: look_at_all(hanging, "full", 2, progress=False),
        lambda: build(hanging, tmp_path, out, 16, 2, report=lambda said: None, progress=False),
    ):
        with pytest.raises(SlowImageError, match=r"hangs.png: is not read"):
            attempt()
    assert not out.exists()


def test_many_images_may_take_longer_than_one(tmp_path, monkeypatch):
    """Patience is with one image, not with a batch."""
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    monkeypatch.setattr(patience, "_LOOK", 0.02)
    real, paths = images.to_array, [worlds.noise_image(tmp_path / f"{i}.png", i) for i in range(8)]

    def slow(image, size):
        threading.Event().wait(0.05)
        return real(image, size)

    monkeypatch.setattr(images, "to_array", slow)
    with Pool(1) as pool:
        assert ImageStore(SIZE).start([paths], pool)().shape == (1, 8, SIZE, SIZE, 3)


def test_a_pool_gives_results_errors_and_order():
    with Pool(3) as pool:
        assert list(pool.map(lambda x: x * x, range(50))) == [x * x for x in range(50)]
        failing = pool.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failing.result()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(len, "")


STUCK = """
import sys, time
sys.path[:0] = {path!r}
from fastidc.data import limits, patience
from fastidc.data.loaders import check_images
from fastidc.data.images import ImageStore
patience.PATIENCE, patience._LOOK, limits.content = 0.3, 0.1, lambda file: time.sleep(3600)
from pathlib import Path
with patience.Pool(2) as pool:
    ImageStore(8).start([[Path({file!r})]], pool)()
"""


@pytest.mark.slow
def test_the_process_ends_though_its_thread_does_not(tmp_path):
    file = worlds.noise_image(tmp_path / "x.png")
    done = subprocess.run([sys.executable, "-c", STUCK.format(path=sys.path, file=str(file))], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"SlowImageError: {file}: is not read after 0.3 s" in done.stderr


def test_loaders_by_name_see_a_pipe(tmp_path):
    """Not one of them opens it: nobody would ever write."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for loader in SOURCES:
        source = choose(loader, None, tmp_path, [pipe], SIZE).open(tmp_path, [pipe], SIZE, torch.device("cpu"))
        with Pool(1) as pool, pytest.raises(FastidcError, match=r"pipe.png: cannot be read as an image \(it is a named pipe and no file\)"):
            source.start([[pipe]], pool)()
