"""`--on-bad-data` through the command line: whole pairs are left out before the first step, the same ones for every loader and for who goes on."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import runs
from runs import check_same_run, kill_after, world

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

from dali_cases import encoded, soft
from test_shared import ROOT, torchrun

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.cli import main
from fastidc.data.bad_data import most_of
from fastidc.data.check import check
from fastidc.data.quarantine import read
from fastidc.errors import FastidcError
from fastidc.train.ledger import LEDGER_FILE

BAD = {"000002.png": "train", "000005.png": "train", "000021.png": "val", "000031.png": "test"}
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
KINDS = {"image-missing": 1, "image-foreign": 1, "image-truncated": 1, "image-broken": 1}
FOLDERS = (("images", "default"), ("sc_images", "semantic"), ("nsc_images", "nonsemantic"))


def spoil(data: Path) -> None:
    """One image of each of `BAD`: a missing distractor, a pipe, an after-image that is cut off, a before-image that is damaged inside."""
    images = {number: [data / folder / f"CLEVR_{kind}_{number}" for folder, kind in FOLDERS] for number in BAD}
    images["000002.png"][2].unlink()
    images["000005.png"][0].unlink()
    os.mkfifo(images["000005.png"][0])
    after = images["000021.png"][1]
    after.write_bytes(after.read_bytes()[:300])
    before = images["000031.png"][0]
    whole = bytearray(encoded(soft(1)))
    whole[len(whole) // 2] ^= 0x55
    before.write_bytes(whole)


@pytest.fixture(scope="module", name="toy")
def make_toy(tmp_path_factory):
    data, start = world(tmp_path_factory.mktemp("toy"))
    shutil.copytree(data, data.with_name("whole"))
    spoil(data)
    return data, start


@pytest.fixture(scope="module", name="clean")
def make_clean(toy, tmp_path_factory):
    """What a run leaves to which the bad pairs were never given: by a quarantine of the check's."""
    out = tmp_path_factory.mktemp("clean")
    check(toy[0], progress=False).write_quarantine(out / "bad.json")
    assert adapt(toy, out / "run", "--quarantine", out / "bad.json") == 0
    return out / "run"


def line(toy, out, *flags):
    few = ["--batch-size", 2, "--epochs", 2, "--select", "val", "--device", "cpu", "--precision", "fp32", "--workers", 1, "--seed", 5]
    return list(map(str, ["--data", toy[0], "--init", toy[1], "--out", out, *few, *flags]))


def adapt(toy, out, *flags):
    return main(["adapt", *line(toy, out, *flags)])


def check_left_out(out: Path, clean: Path) -> None:
    """The run is that of the good pairs, and says what it left out."""
    held = read(out / "left_out.json")
    assert list(held.pairs) == list(BAD)
    assert [kind for ((kind, _),) in held.pairs.values()] == ["image-missing", "image-foreign", "image-truncated", "image-broken"]
    facts = json.loads((out / "metrics.json").read_text())["left_out"]
    assert facts == {"pairs": 4, "splits": {"train": 2, "val": 1, "test": 1}, "kinds": KINDS}
    for name in (LEDGER_FILE, "model.safetensors"):
        assert (out / name).read_bytes() == (clean / name).read_bytes()


def test_raise_ends_before_the_first_step(toy, tmp_path, capsys):
    assert adapt(toy, tmp_path / "run") == 2
    assert "image is missing" in capsys.readouterr().err
    pipe = tmp_path / "data" / "images" / "CLEVR_default_000005.png"
    shutil.copytree(toy[0].with_name("whole"), tmp_path / "data")
    pipe.unlink()
    os.mkfifo(pipe)
    for loader in ("pillow", "dali") if HAS_DALI else ("pillow",):
        assert adapt((tmp_path / "data", toy[1]), tmp_path / "run", "--loader", loader) == 2
        error = capsys.readouterr().err
        assert f"{pipe}: cannot be read as an image (it is a named pipe and no file)" in error
        assert "--on-bad-data skip leaves out the pairs" in error
    assert not (tmp_path / "run").exists()


SLOW = [
    pytest.param(*one, marks=pytest.mark.slow)
    for one in (("pillow", "skip"), ("dali", "limit:4"), ("memory", "skip"), ("resident", "limit:4"), ("auto", "skip"))
]


@pytest.mark.parametrize(("loader", "policy"), [("cache", "skip"), *SLOW])
def test_whole_pairs_are_left_out_whatever_reads(toy, clean, tmp_path, capsys, loader, policy):
    if loader == "dali" and not HAS_DALI:
        pytest.skip("DALI is not installed: pip install nvidia-dali-cuda130")
    flags = ["--loader", loader]
    if loader not in ("pillow", "dali"):
        flags += ["--cache", tmp_path / "c.bin"]
        build = ["cache", "build", "--data", toy[0], "--out", tmp_path / "c.bin", "--size", 32, "--workers", 1]
        assert main([*map(str, build)]) == 2
        assert main([*map(str, build), "--on-bad-data", "skip"]) == 0
        said = capsys.readouterr()
        assert "c.bin: 4 pairs are left out (2 of train, 1 of val, 1 of test): image-missing 1" in said.out
        assert "wrote " in said.out
        assert "27 images of 32 x 32" in said.out
        assert [row.split(":")[1].strip() for row in said.err.splitlines() if row.startswith("left out:")] == list(BAD)
    out = tmp_path / "run"
    assert adapt(toy, out, "--on-bad-data", policy, *flags) == 0
    said = capsys.readouterr().out
    sentence = f"{out / 'left_out.json'}: 4 pairs are left out (2 of train, 1 of val, 1 of test): image-missing 1, image-foreign 1"
    assert said.count(sentence) == 2, "at its start and at its end"
    check_left_out(out, clean)


def test_a_limit(toy, tmp_path, capsys):
    out = tmp_path / "run"
    assert adapt(toy, out, "--on-bad-data", "limit:3") == 2
    error = capsys.readouterr().err
    assert "4 pairs have a bad image, more than the 3 of --on-bad-data limit:3; the first is '000002.png': " in error
    assert "nsc_images/CLEVR_nonsemantic_000002.png: image is missing" in error
    assert not out.exists()
    assert main(["cache", "build", "--data", str(toy[0]), "--out", str(tmp_path / "c.bin"), "--on-bad-data", "limit:0"]) == 2
    assert "4 pairs have a bad image, more than the 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["limit:x", "limit:-1", "limit:", "limit", "drop", "limit:1.5", ""])
def test_what_is_no_policy(text):
    with pytest.raises(FastidcError, match=rf"--on-bad-data is '{text}'; raise, skip or limit:N was expected, N being the bad pairs"):
        most_of(text)


def test_both_stages_and_the_cache_have_the_flag(tmp_path, capsys):
    for command in (["adapt", "--out", str(tmp_path / "run")], ["finetune", "--out", str(tmp_path / "run")], ["cache", "build"]):
        assert main([*command, "--data", str(tmp_path), "--on-bad-data=limit:-1"]) == 2
        assert "--on-bad-data is 'limit:-1'; raise, skip or limit:N was expected" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_bad_is_nothing_left_out(toy, tmp_path, capsys):
    whole = (toy[0].with_name("whole"), toy[1])
    assert adapt(whole, tmp_path / "skip", "--on-bad-data", "skip", "--epochs", 1) == 0
    assert "left_out.json: 0 pairs are left out." in capsys.readouterr().out
    assert adapt(whole, tmp_path / "raise", "--epochs", 1) == 0
    assert not (tmp_path / "raise" / "left_out.json").exists()
    for name in (LEDGER_FILE, "model.safetensors"):
        assert (tmp_path / "skip" / name).read_bytes() == (tmp_path / "raise" / name).read_bytes()


def test_a_full_folder_is_refused_before_the_look(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastidc.data.bad_data.look_at_all", lambda *args: pytest.fail("nobody is to look"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    assert adapt(toy, tmp_path / "run", "--on-bad-data", "skip") == 2
    assert "already exists and is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_cache_holds_is_not_looked_at_again(toy, tmp_path, monkeypatch):
    build = ["cache", "build", "--data", str(toy[0]), "--out", str(tmp_path / "c.bin"), "--size", "32", "--on-bad-data", "skip"]
    assert main(build) == 0
    from fastidc.data import bad_data

    looked, real = [], bad_data.look_at_all
    monkeypatch.setattr(bad_data, "look_at_all", lambda paths, *args: looked.append(len(paths)) or real(paths, *args))
    assert main(build) == 0
    assert adapt(toy, tmp_path / "run", "--on-bad-data", "skip", "--cache", tmp_path / "c.bin", "--epochs", 1) == 0
    assert looked == [9, 9], "three of each of the three pairs that have all their images there"


# going on


def interrupted(toy, out, monkeypatch, *flags):
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(runs.Killed):
            adapt(toy, out, "--save-every-steps", 2, *flags)
    assert (out / "snapshots").is_dir()


@pytest.mark.slow
def test_going_on_takes_the_same_pairs_without_a_look(toy, tmp_path, capsys, monkeypatch):
    """Also where another image has gone bad, or a bad one was mended meanwhile."""
    data = shutil.copytree(toy[0].with_name("whole"), tmp_path / "data")
    toy = data, toy[1]
    mended = data / "sc_images" / "CLEVR_semantic_000003.png"
    content = mended.read_bytes()
    mended.write_bytes(content[:-30])
    assert adapt(toy, tmp_path / "whole", "--on-bad-data", "skip", "--save-every-steps", 2) == 0
    interrupted(toy, tmp_path / "run", monkeypatch, "--on-bad-data", "skip")
    mended.write_bytes(content)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("fastidc.train.left_out.bad_pairs", lambda *args: pytest.fail("nobody is to look"))
        assert adapt(toy, tmp_path / "run", "--on-bad-data", "limit:1", "--save-every-steps", 2, "--resume", "auto") == 0
        again = tmp_path / "again"
        assert adapt(toy, again, "--on-bad-data", "skip", "--save-every-steps", 2, "--resume", tmp_path / "other") == 0
    said = capsys.readouterr().out
    assert "left_out.json: the run goes on without the pairs that it left out before; images are not looked at anew." in said
    assert f"{again / 'left_out.json'}: 1 pair is left out (1 of train): image-truncated 1." in said
    check_same_run(tmp_path / "run", tmp_path / "whole")
    check_same_run(again, tmp_path / "whole")


@pytest.mark.slow
def test_going_on_with_other_pairs_is_refused(toy, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    interrupted(toy, out, monkeypatch, "--on-bad-data", "skip")
    file = out / "left_out.json"
    held, flags = json.loads(file.read_text()), ["--resume", "auto", "--on-bad-data"]
    capsys.readouterr()

    def refused(policy):
        assert adapt(toy, out, *flags, policy) == 2
        return capsys.readouterr().err

    assert "the run that goes on left these 4 pairs out; add --on-bad-data skip, or begin anew" in refused("raise")
    assert "4 pairs have a bad image, more than the 2 of --on-bad-data limit:2" in refused("limit:2")
    for change in (held["pairs"][1:], [*held["pairs"], {"id": "000007.png", "reasons": []}]):
        file.write_text(json.dumps(held | {"pairs": change}))
        assert f"{file}: was changed: " in refused("skip")
    file.unlink()
    assert "left_out.json: no such quarantine" in refused("skip")
    file.write_text(json.dumps(held))
    data = shutil.copytree(toy[0], tmp_path / "data", ignore=lambda folder, names: [n for n in names if "000005" in n])
    gone = data / "images" / "CLEVR_default_000007.png"
    gone.write_bytes(gone.read_bytes()[:-30])
    assert adapt((data, toy[1]), out, *flags, "skip") == 2
    said = capsys.readouterr()
    assert f"{gone}: cannot be read as an image" in said.err
    assert "goes on after step" not in said.out, "said before a step is made"
    assert adapt(toy, out, *flags, "skip") == 0


@pytest.mark.slow
def test_going_on_from_a_run_that_left_nothing_out(toy, tmp_path, capsys, monkeypatch):
    whole = (toy[0].with_name("whole"), toy[1])
    interrupted(whole, tmp_path / "run", monkeypatch)
    assert adapt(whole, tmp_path / "run", "--on-bad-data", "skip", "--resume", "auto") == 0
    assert "goes on with all pairs, for it began without leaving any out" in capsys.readouterr().out
    assert not (tmp_path / "run" / "left_out.json").exists()


def test_identity_knows_what_is_left_out():
    """Reasons are not part of it, and none is none."""
    from fastidc.data.quarantine import Quarantine
    from fastidc.train.identity import check_same as check_identity
    from fastidc.train.identity import of_left_out

    def held(*ids, why="image-empty"):
        return Quarantine(Path("x"), "clevr", "f", {id_: ((why, "it is"),) for id_ in ids})

    assert of_left_out(None) is of_left_out(held()) is None
    assert of_left_out(held("a", "b")) == of_left_out(held("b", "a", why="image-bomb")) != of_left_out(held("a", "c"))
    with pytest.raises(
        FastidcError, match=r"left_out 2 pairs, fingerprint .* and this one has None; resume with the --on-bad-data and the"
    ):
        check_identity({"left_out": of_left_out(held("a", "b"))}, {"left_out": None}, "s")
    check_identity({}, {"left_out": None}, "a snapshot of before")


@pytest.mark.slow
def test_captions_and_scoring_a_run_again(toy, tmp_path, capsys, monkeypatch):
    """The run's own data are read as the run read them."""
    monkeypatch.setenv("PATH", "")  # METEOR takes seconds to start
    monkeypatch.delenv("JAVA_HOME", raising=False)
    out = tmp_path / "run"
    assert main(["finetune", *line(toy, out, "--on-bad-data", "skip")]) == 0
    assert sorted(json.loads((out / "change_test.json").read_text())) == ["000030.png", "000030.png_n"]
    assert main(["evaluate", "run", str(out), "--beams", "1", "--resamples", "0", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_one_of_two_processes_looks(toy, clean, tmp_path):
    """It alone is told of the images, both leave the pairs out, and they take every sample once."""
    out = tmp_path / "run"
    done = torchrun(2, [str(ROOT / "tests/train/runs.py"), "adapt", *line(toy, out, "--on-bad-data", "skip")])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("4 pairs are left out") == 2
    assert (out / LEDGER_FILE).read_bytes() == (clean / LEDGER_FILE).read_bytes()
    assert list(read(out / "left_out.json").pairs) == list(BAD)
