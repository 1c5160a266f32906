"""`fastidc export|push` as a user meets them; what they write is judged in tests/share."""

import pytest
import torch

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import image_pairs
from share.shared_runs import finished

from fastidc import share
from fastidc.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "run")


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert error.startswith("fastidc: ")
    return error


def test_export_then_caption(run, tmp_path, capsys):
    """What is exported captions as the run does, by the command."""
    assert main(["export", str(run), str(tmp_path / "x"), "--licence", "mit", "--dataset", "Mine", "--name", "Changes of mine"]) == 0
    said = capsys.readouterr().out
    size = (tmp_path / "x" / "model.safetensors").stat().st_size
    assert f"wrote {tmp_path / 'x'}: " in said
    assert f"model.safetensors {size:,} bytes" in said
    assert "unknown" not in said
    assert "\n# Changes of mine\n" in (tmp_path / "x" / "README.md").read_text()
    images = [str(path) for path in image_pairs(tmp_path / "images", 1)[0]]
    rows = []
    for model in (run, tmp_path / "x"):
        assert main(["caption", *images, "--model", str(model), "--device", "cpu", "--json"]) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1]
    assert '"p_change": null' not in rows[0]


def test_a_licence_that_is_not_stated_is_said(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "x")]) == 0
    assert 'the licence is given as "unknown", so nobody may use the model: say it with --licence' in capsys.readouterr().out


def test_refusals(run, tmp_path, capsys):
    x, program = tmp_path / "x", tmp_path / "x.pt2"
    assert "absent: no such run folder" in refused(capsys, "export", tmp_path / "absent", x)
    assert "x.pt2: is named as a program; add --program" in refused(capsys, "export", run, program)
    assert "x: a program's name ends in .pt2" in refused(capsys, "export", run, x, "--program")
    assert "--licence belongs to a folder's card" in refused(capsys, "export", run, program, "--program", "--licence", "mit")
    assert "--max-words belongs to --program" in refused(capsys, "export", run, x, "--max-words", "9")
    assert list(tmp_path.iterdir()) == []


def test_program(run, tmp_path, capsys, monkeypatch):
    """The command hands on what it was told; making one takes seconds, see tests/share/test_program.py."""
    told = {}

    def stand_in(source, out, **options):
        told.update(source=source, out=out, **options)
        return share.Program(out, 1_000_000, 123, 9, 48)

    monkeypatch.setattr(share, "export_program", stand_in)
    out = tmp_path / "x.pt2"
    assert main(["export", str(run), str(out), "--program", "--max-words", "9", "--overwrite"]) == 0
    assert told == {"source": str(run), "out": out, "max_words": 9, "overwrite": True}
    assert "123 parameters, 1.0 MB; before, after uint8 [B, 3, 48, 48] -> ids [B, 9]" in capsys.readouterr().out


@pytest.mark.slow
def test_program_of_a_run(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "x.pt2"), "--program", "--max-words", "5"]) == 0
    assert "run it with torch alone: example.py" in capsys.readouterr().out
    found = torch.export.load(tmp_path / "x.pt2").module()(*torch.zeros(2, 3, 3, 48, 48, dtype=torch.uint8))
    assert found.shape == (3, 5)
