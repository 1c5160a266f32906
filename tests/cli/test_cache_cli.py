"""`fastidc cache`, and runs of both command lines that read one: the same weights as with Pillow."""

import importlib.util
import json
import re
import shutil
import sys

import pytest
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.cli import main
from fastidc.data.sources import DECODERS
from fastidc.train.official import main as official

SPLITS = {"train": list(range(8)), "val": [20, 21], "test": [30, 31, 32]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", SPLITS)


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "112.bin"
    assert main(["cache", "build", "--data", str(data), "--out", str(out), "--size", "112", "--workers", "2"]) == 0
    return out


def adapt(data, out, *flags):
    few = ["--preset", "tiny", "--steps", "3", "--batch-size", "4", "--device", "cpu"]
    return main(["adapt", "--data", str(data), "--out", str(out), *few, *map(str, flags)])


def test_build_and_info(data, cache, tmp_path, capsys):
    out = tmp_path / "c.bin"
    flags = ["cache", "build", "--data", str(data), "--out", str(out), "--size", "16"]
    assert main(flags) == 0
    assert re.match(rf"wrote {out}: 39 images of 16 x 16, [\d,]+ bytes; 39 decoded at [\d,]+ images/s", capsys.readouterr().out)
    assert main(flags) == 0
    assert capsys.readouterr().out == f"{out} is up to date: 39 images of 16 x 16\n"
    assert main(["cache", "info", str(out), "--verify"]) == 0
    said = capsys.readouterr().out
    for line in (
        "39 of 16 x 16, uint8 RGB",
        f"made from: {data} (clevr)",
        "builder:   pillow ",
        "bicubic squash",
        "all have their checksum",
    ):
        assert line in said
    broken = bytearray(out.read_bytes())
    broken[5000] ^= 1
    out.write_bytes(broken)
    assert main(["cache", "info", str(out)]) == 0
    capsys.readouterr()
    assert main(["cache", "info", str(out), "--verify"]) == 2
    sentence = r"fastidc: .*c.bin: a damaged cache, the pixels of sc_images/CLEVR_semantic_000000.png do not have their checksum"
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["info", "{tmp}/gone.bin"], "gone.bin: no such cache; make it with `fastidc cache build"),
        (["info", "{data}/splits.json"], "splits.json: is no cache of fastidc; name another file"),
        (["build", "--data", "{tmp}/nothing"], "nothing: no such data folder"),
        (["build", "--data", "{data}", "--out", "{data}"], "a folder; name the file with --out"),
        (["build", "--data", "{data}", "--out", "{data}/splits.json"], "exists and is no cache of fastidc; choose another --out"),
        (["build", "--data", "{data}", "--out", "{tmp}/c.bin", "--size", "0"], "--size must be at least 1, got 0"),
        (["build", "--data", "{data}", "--out", "{data}/splits.json/c.bin"], "c.bin.lock cannot be written (File exists)"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(data, tmp_path, capsys, flags, sentence):
    assert main(["cache", *(flag.format(tmp=tmp_path, data=data) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastidc: ")
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_loader_trains_the_same_model(data, cache, tmp_path, capsys):
    loaders = {
        "pillow": "Pillow",
        "cache": f"cache on disk, {cache}",
        "memory": f"cache in memory, {cache}",
        "resident": f"cache in the memory of cpu, {cache}",
    }
    if importlib.util.find_spec("nvidia.dali"):
        from fastidc.data.dali import DaliImages

        loaders["dali"] = DaliImages(112, "cpu", threads=1).name
    for loader, name in loaders.items():
        assert adapt(data, tmp_path / loader, "--loader", loader, *(() if loader in DECODERS else ("--cache", cache))) == 0
        assert re.search(
            rf"^Loader: {re.escape(name)}; [\d,]+ images/s, \d+% of the time spent waiting", capsys.readouterr().out, re.MULTILINE
        )
        assert json.loads((tmp_path / loader / "config.json").read_text())["run"]["loader"] == name
    one, *others = ((tmp_path / loader / "model.safetensors").read_bytes() for loader in loaders)
    assert all(other == one for other in others)


def test_a_cache_beside_the_data_is_found(cache, tmp_path, capsys):
    data = worlds.clevr_tree(tmp_path / "data", SPLITS)
    place = data / "fastidc-cache-112.bin"
    assert main(["cache", "build", "--data", str(data), "--size", "112"]) == 0
    assert place.is_file()
    assert adapt(data, tmp_path / "run") == 0
    assert f"Images come from the cache {place}." in capsys.readouterr().out
    worlds.noise_image(data / "images" / "CLEVR_default_000003.png", seed=4)
    assert adapt(data, tmp_path / "stale", "--loader", "cache") == 2
    assert re.search(r"^fastidc: .*cache-112.bin: .*000003.png has changed since it was built; build it anew", capsys.readouterr().err)
    assert not (tmp_path / "stale").exists()
    assert adapt(data, tmp_path / "pillow") == 0
    assert "Images are decoded by Pillow: " in capsys.readouterr().out
    shutil.copyfile(cache, tmp_path / "other.bin")
    assert adapt(data, tmp_path / "stale", "--cache", tmp_path / "other.bin") == 2
    assert "has changed" in capsys.readouterr().err
    assert adapt(data, tmp_path / "stale", "--cache", tmp_path / "gone.bin") == 2
    assert "gone.bin: no such cache" in capsys.readouterr().err


def test_the_official_command_line_reads_it_too(data, tmp_path):
    clip = worlds.clip_file(tmp_path / "ViT.pt")
    out = tmp_path / "64.bin"
    assert main(["cache", "build", "--data", str(data), "--out", str(out), "--size", "64"]) == 0
    flags = ["--do_train", "--epochs=1", "--batch_size=8", "--datatype=clevr", "--intra_num_hidden_layers=2", "--device=cpu"]
    flags += [f"--data_path={data}", f"--pretrained_clip_name={clip}"]
    for name, more in (("pillow", ["--loader=pillow"]), ("cache", [f"--cache={out}"])):
        assert official([*flags, f"--output_dir={tmp_path / name}", *more]) == 0
    log = (tmp_path / "cache" / "log.txt").read_text()
    assert re.search(rf"INFO: Loader: cache on disk, {out}; [\d,]+ images/s, \d+% of the time spent waiting for them\.$", log, re.MULTILINE)
    assert f"Images come from the cache {out}." in log
    one, other = ((tmp_path / name / "pytorch_model.bin.0").read_bytes() for name in ("pillow", "cache"))
    assert one == other


# DALI


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    return worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", SPLITS)


def test_dali_trains(soft, tmp_path, capsys):
    assert adapt(soft, tmp_path / "run", "--loader", "dali", "--steps", 2, "--workers", 1) == 0
    name = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["loader"]
    assert re.fullmatch(r"DALI [\d.]+ on the CPU, squashed by Pillow", name)
    assert f"Loader: {name}; " in capsys.readouterr().out
    assert len((tmp_path / "run" / "model.safetensors").read_bytes()) > 1000


def test_dali_builds_and_info_says_how_far_from_pillow(soft, tmp_path, capsys):
    out = tmp_path / "d.bin"
    assert main(["cache", "build", "--data", str(soft), "--out", str(out), "--size", "16", "--builder", "dali", "--workers", "1"]) == 0
    assert "39 images of 16 x 16" in capsys.readouterr().out
    assert main(["cache", "info", str(out), "--verify"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^vs Pillow: \d+\.\d+% of values are off by more than 1 level, at most by \d+ \(39 images compared\)$", said, re.MULTILINE
    )


def test_an_absent_dali_is_one_sentence_and_exit_code_2(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    build = ["cache", "build", "--data", str(data), "--out", str(tmp_path / "c.bin"), "--builder", "dali"]
    clip = worlds.clip_file(tmp_path / "ViT.pt")
    flags = ["--do_train", "--datatype=clevr", "--device=cpu", "--loader=dali", f"--output_dir={tmp_path / 'official'}", "--batch_size=8"]
    flags += [f"--data_path={data}", f"--pretrained_clip_name={clip}", "--intra_num_hidden_layers=2"]
    for run in (lambda: main(build), lambda: adapt(data, tmp_path / "run", "--loader", "dali"), lambda: official(flags)):
        assert run() == 2
        error = capsys.readouterr().err
        assert "DALI is not installed; `pip install 'fastidc[cuda13]'` brings it" in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "c.bin").exists()
