"""Builds of a cache that do not finish, each with a sentence, and go on."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import worlds
from cache_cases import COUNT, SPLITS, beside, images, made, make_data, make_file, make_world, quiet  # noqa: F401
from dali_cases import close, soften
from PIL import Image

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.data import cache_build
from fastidc.data.cache import HEADER_BYTES, Cache
from fastidc.data.cache_build import build
from fastidc.data.images import check_file, decode
from fastidc.data.sources import choose
from fastidc.errors import FastidcError
from fastidc.files import exclusive

# builds that do not finish


SLOW = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from fastidc.data import cache_build, cache_builders
from fastidc.data.loaders import distinct_images
from fastidc.data.records import load_records
real = cache_builders.decode_bytes
def slow(*args):
    time.sleep(0.05)
    return real(*args)
cache_builders.decode_bytes = slow
data = Path({data!r})
cache_build.build(distinct_images(load_records(data).values()), data, {out!r}, 16, 2, progress=False)
"""


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_build_goes_on(data, file, tmp_path, times):
    out = tmp_path / "killed.bin"
    journal, code = tmp_path / "killed.bin.journal", SLOW.format(path=sys.path, data=str(data), out=str(out))
    lines = 1
    for _ in range(times):
        child = subprocess.Popen([sys.executable, "-c", code])
        patience = time.monotonic() + 60
        while time.monotonic() < patience and not (journal.is_file() and journal.read_bytes().count(b"\n") >= lines + 5):
            time.sleep(0.01)
        with pytest.raises(FastidcError, match=rf"killed.bin is being made by process {child.pid} on .* since .*; wait until it is done"):
            made(data, out)
        child.send_signal(signal.SIGKILL)
        child.wait()
        lines = journal.read_bytes().count(b"\n")
        assert beside(out) == ["killed.bin.journal", "killed.bin.lock", "killed.bin.partial"], "nothing bears the cache's name"
        with pytest.raises(FastidcError, match="a cache whose build has not finished; `fastidc cache build` goes on with it"):
            Cache(tmp_path / "killed.bin.partial")
    with journal.open("ab") as torn:
        torn.write(b'[41,"nsc_ima')
    assert 0 < made(data, out).decoded <= COUNT - 5 * times
    assert np.array_equal(Cache(out).pixels, Cache(file).pixels)
    assert Cache(out).damaged_pixels() == []
    assert beside(out) == ["killed.bin"]


def failing(monkeypatch, after: int, code: int = errno.ENOSPC):
    """os.pwrite, which fails from the ``after``-th call on, having written a little."""
    real, calls = os.pwrite, []

    def pwrite(file, content, start):
        calls.append(start)
        if len(calls) == after:
            return real(file, bytes(content)[:10], start)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return real(file, content, start)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("after", [2, 12, COUNT + 1, COUNT + 2, COUNT + 3])
def test_a_full_disk_is_a_sentence_and_the_work_is_kept(data, file, tmp_path, monkeypatch, after):
    """The last ones: while the index and the header that says "finished" are being written."""
    out = tmp_path / "full.bin"
    failing(monkeypatch, after)
    with pytest.raises(FastidcError) as refusal:
        made(data, out, workers=1)
    monkeypatch.undo()
    done = min(COUNT, after - 2)
    assert str(refusal.value) == (
        f"{out}.partial: cannot be written (No space left on device); make room, or choose a folder with room that you may write to with --out; "
        f"{done} of {COUNT} images are done, and the same command goes on from there."
    )
    assert not out.exists()
    assert made(data, out).decoded == COUNT - done
    assert np.array_equal(Cache(out).pixels, Cache(file).pixels)
    assert beside(out) == ["full.bin"]


def test_a_disk_that_is_too_small_is_known_before_anything_is_decoded(data, tmp_path):
    """RLIMIT_FSIZE is the smallest disk there is; on the command line, one sentence and exit code 2."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from fastidc.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = ["cache", "build", "--data", str(data), "--out", str(tmp_path / "c.bin"), "--size", "16"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert re.match(r"fastidc: .*c.bin.partial: cannot be written \(File too large; 36,352 bytes are needed\); make room", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_costs_nothing(data, tmp_path, monkeypatch):
    out = tmp_path / "c.bin"

    def refuse(*names):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FastidcError, match="Input/output error"):
        made(data, out)
    monkeypatch.undo()
    assert not out.exists()
    assert made(data, out).decoded == 0
    assert len(Cache(out).entries) == COUNT


def test_pixels_that_never_reached_the_disk_are_decoded_again(data, tmp_path, monkeypatch):
    """After a loss of power the journal may know more than the file holds; and an image may have changed meanwhile."""
    out = tmp_path / "c.bin"
    failing(monkeypatch, 20)
    with pytest.raises(FastidcError):
        made(data, out, workers=1)
    monkeypatch.undo()
    with (tmp_path / "c.bin.partial").open("r+b") as partial:
        partial.seek(HEADER_BYTES + 3 * 768)
        partial.write(bytes(2 * 768))
    assert made(data, out).decoded == COUNT - 18 + 2
    assert Cache(out).damaged_pixels() == []


def test_an_interrupted_build_says_how_to_go_on(data, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    heard = []
    monkeypatch.setattr(cache_build, "note", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(data, tmp_path / "c.bin", heard=heard.append)
    assert heard == [f"{tmp_path / 'c.bin'}: 0 of {COUNT} images are done, and the same command goes on from there."]


def test_one_builder_at_a_time(data, tmp_path):
    out = tmp_path / "c.bin"
    lock = tmp_path / "c.bin.lock"
    with exclusive(lock, str(out)), pytest.raises(FastidcError, match=rf"c.bin is being made by process {os.getpid()} on "):
        made(data, out)
    assert not lock.exists()
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))
    with pytest.raises(FastidcError, match=r"by process 1 on elsewhere since yesterday, as .*c.bin.lock says; wait .* or delete that file"):
        made(data, out)
    lock.write_text("")  # left behind by a process that was killed at once
    assert made(data, out).decoded == COUNT


def test_a_folder_that_one_may_not_write_to(tmp_path):
    """As another user where this one may write everywhere."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        data = worlds.clevr_tree(folder / "data", {"train": [1], "val": [], "test": []})
        (folder / "closed").mkdir(mode=0o555)
        paths, root = images(data), os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(
                FastidcError, match=r"c.bin.lock cannot be written \(Permission denied\); choose a folder with room that you may"
            ):
                build(paths, data, folder / "closed" / "c.bin", 16, report=quiet, progress=False)
        finally:
            if root:
                os.seteuid(0)


def test_bad_images_are_reported_together_as_the_data_check_says_it(world, tmp_path):
    out, paths, heard = tmp_path / "c.bin", images(world), []
    kept = [paths[3].read_bytes(), paths[8].read_bytes()]
    paths[3].write_bytes(b"<html>")
    with pytest.raises(FastidcError, match=rf"{paths[3]}: cannot be read as an image .* 41 of 42 images are done"):
        made(world, out)
    paths[8].write_bytes(kept[1][:-20])  # its pixels are all there, but the data check refuses it
    with pytest.raises(FastidcError, match=r"2 of 42 images, named above, cannot be decoded; replace .* 40 of 42 images are done"):
        made(world, out, heard=heard.append)
    for path, sentence in zip((paths[3], paths[8]), heard, strict=True):
        with pytest.raises(FastidcError) as refusal:
            check_file(path)
        assert sentence == str(refusal.value)
    assert not out.exists()
    for path, content in zip((paths[3], paths[8]), kept, strict=True):
        path.write_bytes(content)
    assert made(world, out).decoded == 1, "the other one is again what had been decoded"
    assert beside(out) == ["c.bin"]


def test_what_makes_no_sense(data, tmp_path):
    for more, sentence in (
        ({"size": 0}, "--size must be at least 1"),
        ({"workers": 0}, "--workers must be"),
        ({"builder": "x"}, "--builder is"),
    ):
        with pytest.raises(FastidcError, match=sentence):
            made(data, tmp_path / "c.bin", **more)
    with pytest.raises(FastidcError, match="names no image"):
        build([], data, tmp_path / "c.bin", report=quiet)


# other builders


def test_pillows_first_number_alone_makes_a_cache_another_one(data, tmp_path, monkeypatch):
    out, heard = tmp_path / "c.bin", []
    made(data, out)
    assert Cache(out).notes() == []
    monkeypatch.setattr("PIL.__version__", f"{PIL.__version__.partition('.')[0]}.99.1")
    assert made(data, out).decoded == 0, "a minor release changes no pixels"
    monkeypatch.setattr("PIL.__version__", "99.0.0")
    sentence = rf"It was built with Pillow {Cache(out).about['builder']['version'].partition('.')[0]}, and Pillow 99 is installed"
    assert re.match(sentence, *Cache(out).notes())
    assert re.search(rf"^note: +{sentence}", Cache(out).describe(), re.MULTILINE)
    chosen = choose("cache", out, data, images(data), 16)
    assert re.search(rf"Images come from the cache .*c.bin\. {sentence}", chosen.note)
    assert made(data, out, heard=heard.append).decoded == COUNT
    assert re.search(r"c.bin is replaced: it holds images of 16 x 16 by pillow \d+\.\d+.*, bicubic squash\.", heard[0])


@pytest.fixture(name="soft", scope="module")
def make_soft(tmp_path_factory):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    root = worlds.clevr_tree(tmp_path_factory.mktemp("soft") / "data", SPLITS)
    soften(root)
    return root


def test_built_by_dali_it_says_how_far_from_pillow_it_is(soft, tmp_path, monkeypatch):
    out = tmp_path / "d.bin"
    monkeypatch.setattr("fastidc.data.dali.squash_on", lambda device, wish: "dali")
    assert made(soft, out, 24, builder="dali", workers=1).decoded == COUNT
    cache = Cache(out)
    assert cache.damaged_pixels() == []
    assert [(entry.width, entry.height) for entry in cache.entries] == [(96, 64)] * COUNT
    truth = np.stack([decode(path, 24) for path in images(soft)])
    off = np.abs(truth.astype(np.int16) - cache.pixels)
    measured = cache.about["difference"]
    assert measured == {"images": COUNT, "over_1": (off > 1).mean(), "largest": off.max()}
    assert close(cache.pixels, truth)
    assert off.any(), "it is DALI's"
    said = cache.describe()
    assert re.search(r"^builder:   dali [\d.]+ on (cpu|cuda), .* squash.*; pillow [\d.]+ for what DALI leaves to it$", said, re.MULTILINE)
    assert re.search(
        r"^vs Pillow: 0\.0\d\d% of values are off by more than 1 level, at most by \d \(42 images compared\)$", said, re.MULTILINE
    )
    chosen = choose("auto", out, soft, images(soft), 24)
    assert re.search(r"Images come from the cache .*d.bin\. It was built by dali: next to Pillow 0\.0", chosen.note)
    assert made(soft, out, 24, builder="dali", workers=1).decoded == 0
    heard = []
    assert made(soft, out, 24, heard=heard.append).decoded == COUNT, "Pillow's is another cache"
    assert "by dali" in heard[0]
    assert np.array_equal(Cache(out).pixels, truth)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert made(soft, out, 24, builder="dali", workers=1).decoded == COUNT
        assert np.array_equal(Cache(out).pixels, truth), "decoded by DALI and squashed by Pillow"
        assert Cache(out).about["difference"] == {"images": COUNT, "over_1": 0.0, "largest": 0}


def test_dalis_build_goes_on_too(soft, tmp_path, monkeypatch):
    whole, out = made(soft, tmp_path / "whole.bin", 24, builder="dali", workers=1).path, tmp_path / "d.bin"
    failing(monkeypatch, 20)
    with pytest.raises(FastidcError, match="No space left on device"):
        made(soft, out, 24, builder="dali", workers=1)
    monkeypatch.undo()
    journal = (tmp_path / "d.bin.journal").read_text().count("\n") - 1
    assert made(soft, out, 24, builder="dali", workers=1).decoded == COUNT - journal
    assert np.array_equal(Cache(out).pixels, Cache(whole).pixels)
    assert Cache(out).about["difference"] == Cache(whole).about["difference"]
    assert beside(out) == ["d.bin"]


def test_dalis_build_reports_bad_images_as_pillows_does(tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    world = worlds.clevr_tree(tmp_path / "data", SPLITS)
    soften(world)
    paths, heard = images(world), {"pillow": [], "dali": []}
    contents = [path.read_bytes() for path in paths]
    paths[3].write_bytes(b"<html>")
    paths[5].write_bytes(contents[5][: len(contents[5]) // 2])
    paths[8].write_bytes(contents[0][:-20])
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(paths[10], "GIF")
    for builder, list_ in heard.items():
        with pytest.raises(FastidcError, match=r"3 of 42 images, named above, cannot be decoded; .* 39 of 42 images are done"):
            made(world, tmp_path / f"{builder}.bin", 24, heard=list_.append, builder=builder, workers=1)
    assert heard["dali"] == heard["pillow"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert made(world, tmp_path / "dali.bin", 24, builder="dali", workers=1).decoded == 4
