"""`fastidc push` and hub:OWNER/NAME against a Hub on this machine: what is uploaded is what is read, and every failure is a sentence."""

import json
import socket
import sys

import pytest
import torch

pytest.importorskip("huggingface_hub", reason="the Hub needs the package huggingface_hub: install fastidc[hub]")
pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

import huggingface_hub as hub_library
from describe.cases import image_pairs
from share.hub_double import TOKEN, running
from share.shared_runs import finished

from fastidc import CLIP4IDC, Describer, checkpoint
from fastidc.checkpoint import hub as door
from fastidc.cli import main
from fastidc.errors import FastidcError
from fastidc.share import export, push

NAME = "me/changes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "run", calibration={"scale": 2.0, "shift": 0.5, "split": "val", "pairs": 8})


def point_at(monkeypatch, address, cache):
    constants = hub_library.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    door.fetch.cache_clear()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as (address, held):
        point_at(monkeypatch, address, tmp_path / "cache")
        yield held
    door.fetch.cache_clear()


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    assert error.count("fastidc: ") == 1, error  # beside a bar of what was fetched
    assert error.splitlines()[-1].startswith("fastidc: ")
    return error.splitlines()[-1]


def test_there_and_back(run, hub, tmp_path, capsys):
    assert main(["push", str(run), NAME, "--licence", "mit", "--private"]) == 0
    assert f"/{NAME}" in capsys.readouterr().out
    assert hub.created[NAME].get("private") is True or hub.created[NAME].get("visibility") == "private"
    held = hub.held[NAME]["main"]
    assert {name for name in held if name != ".gitattributes"} == {"README.md", "config.json", "model.safetensors", "no_change.json"}
    assert held["README.md"].startswith(b'---\nlicense: "mit"\n')
    assert b"secret" not in held["config.json"]
    source = f"hub:{NAME}"
    ours, theirs = CLIP4IDC.from_pretrained(run), CLIP4IDC.from_pretrained(source)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    pairs = image_pairs(tmp_path / "images", 2)
    mine, found = ([(d.caption, d.p_change) for d in Describer(model, "cpu", 1).many(pairs)] for model in (run, source))
    assert mine == found
    assert all(p is not None for _, p in found), "no_change.json came along"
    assert main(["convert", source, str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "no_change.json").read_bytes() == (run / "no_change.json").read_bytes()


def test_a_revision(run, hub, tmp_path):
    push(run, NAME, licence="mit")
    other = finished(tmp_path / "other", seed=9)
    push(other, NAME, licence="mit", revision="second")
    first, second = (CLIP4IDC.from_pretrained(f"hub:{NAME}{at}") for at in ("", "@second"))
    assert torch.equal(first.captioner.head.weight, CLIP4IDC.from_pretrained(run).captioner.head.weight)
    assert torch.equal(second.captioner.head.weight, CLIP4IDC.from_pretrained(other).captioner.head.weight)
    with pytest.raises(FastidcError, match=rf"hub:{NAME}@third: the repository has no such revision"):
        CLIP4IDC.from_pretrained(f"hub:{NAME}@third")


def test_an_exported_folder_keeps_its_edited_card(run, hub, tmp_path, capsys):
    export(run, tmp_path / "out", licence="mit")
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "\nMore about it.\n")
    (tmp_path / "out" / "pickled.bin").write_bytes(b"no")
    page, notes = push(tmp_path / "out", NAME)
    assert page.endswith(NAME)
    assert notes == []
    assert hub.held[NAME]["main"]["README.md"].endswith(b"More about it.\n")
    assert "pickled.bin" not in hub.held[NAME]["main"]
    for flag in ("licence", "dataset"):
        said = f"write the {flag} into its card, and leave out --{flag}"
        assert said in refused(capsys, "push", tmp_path / "out", NAME, f"--{flag}", "mit")


def test_offline_reads_the_cache_alone(run, hub, monkeypatch, capsys):
    push(run, NAME, licence="mit")
    CLIP4IDC.from_pretrained(f"hub:{NAME}")
    door.fetch.cache_clear()
    monkeypatch.setattr(hub_library.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert CLIP4IDC.from_pretrained(f"hub:{NAME}").captioner is not None
    assert len(hub.asked) == asked, "nothing was asked"
    assert "is not in the cache, and the Hub cannot be reached" in refused(capsys, "convert", "hub:me/other", "x")
    assert "huggingface_hub is offline (HF_HUB_OFFLINE)" in refused(capsys, "push", run, NAME)


def test_what_is_not_ours_is_not_fetched(hub, tmp_path, capsys):
    hub.held["me/other"] = {"main": {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"0" * 1000}}
    assert "its config.json is not that of a fastidc model" in refused(capsys, "convert", "hub:me/other", tmp_path / "x")
    assert not [line for line in hub.asked if "resolve" in line and "safetensors" in line]
    config = json.dumps({"format": "fastidc", "model": {}}).encode()
    hub.held["me/pickle"] = {"main": {"config.json": config, "pytorch_model.bin": b"\x80\x04"}}
    assert "has no model.safetensors, the only form of weights" in refused(capsys, "convert", "hub:me/pickle", tmp_path / "x")
    assert not [line for line in hub.asked if "pytorch_model" in line]
    assert not (tmp_path / "x").exists()


def test_refusals(run, hub, tmp_path, monkeypatch, capsys):
    assert "hub:me/absent: the Hub has no such repository, or it is private" in refused(capsys, "convert", "hub:me/absent", tmp_path / "x")
    assert "a model on the Hub is hub:OWNER/NAME" in refused(capsys, "convert", "hub:absent", tmp_path / "x")
    assert "a model on the Hub is hub:OWNER/NAME" in refused(capsys, "push", run, "absent")
    assert "a branch is given with --revision" in refused(capsys, "push", run, "me/x@main")
    assert "no such run folder" in refused(capsys, "push", tmp_path / "absent", NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refuses this token" in refused(capsys, "push", run, NAME)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_library, "get_token", lambda: None)
    assert "the Hub wants to know who you are; set HF_TOKEN" in refused(capsys, "push", run, NAME)
    assert hub.held == {}


def test_no_network(run, tmp_path, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_at(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "cache")
    assert "is not in the cache, and the Hub cannot be reached (no network" in refused(capsys, "convert", "hub:me/x", tmp_path / "x")
    assert "hub:me/x: the Hub cannot be asked" in refused(capsys, "push", run, "me/x", "--licence", "mit")


def test_without_the_package(monkeypatch, run, capsys):
    door.fetch.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for line in (["convert", "hub:me/x", "x"], ["push", run, "me/x"]):
        assert "needs huggingface_hub, which cannot be imported" in (said := refused(capsys, *line))
        assert said.endswith("pip install fastidc[hub].")


def test_a_source_is_fetched_once_a_process(run, hub):
    push(run, NAME, licence="mit")
    CLIP4IDC.from_pretrained(f"hub:{NAME}")
    asked = len(hub.asked)
    CLIP4IDC.from_pretrained(f"hub:{NAME}")
    folder = checkpoint.folder_of(f"hub:{NAME}")
    assert len(hub.asked) == asked
    assert checkpoint.read_config(folder)["preset"] == "clevr"
    assert checkpoint.folder_of(run) == run
    assert checkpoint.folder_of(run / "model.safetensors") is None
    assert checkpoint.folder_of("open_clip:ViT-B-32-quickgelu/openai") is None


def test_a_readme_of_ones_own_is_no_card(hub, tmp_path):
    """A run folder in which somebody wrote a note is a run still: its card is made, the note stays at home."""
    run = finished(tmp_path / "run")
    (run / "README.md").write_text("Tuesday's run.")
    push(run, NAME, licence="mit")
    assert b"Tuesday" not in hub.held[NAME]["main"]["README.md"]
    assert b"| overall | 8 |" in hub.held[NAME]["main"]["README.md"]
