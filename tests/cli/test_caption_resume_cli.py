"""`fastidc caption --out` that is run again: rows that are there stay, and are of one model."""

import contextlib
import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from caption_cases import caption, check, give, make_expected, make_folder, make_run, make_table, rows_of  # noqa: F401
from describe.cases import image_pairs, run_folder

from fastidc import Describer
from fastidc.cli import main


def test_a_file_is_of_one_model_and_one_search(run, folder, capsys, monkeypatch, tmp_path):
    out, meta, other = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.meta.json", run_folder(tmp_path / "other", seed=5)
    lines = [json.dumps({"before": f"{i}.png", "after": f"{i}_2.png"}) + "\n" for i in range(4)]

    def go(count, *flags, model=run):
        give(monkeypatch, "".join(lines[:count]))
        code = caption("-", "--model", model, "--images", folder, "--out", out, *flags)
        return code, capsys.readouterr().err

    assert go(1)[0] == 0
    kept = json.loads(meta.read_text())
    assert (kept["source"], kept["beams"], kept["length_penalty"], kept["max_words"]) == (str(run), 3, 0.7, 12)
    content = out.read_bytes()
    for flags, model, sentence in (
        (["--beams", 2], run, "made with beams 3, and beams is 2 now; delete"),
        (["--beams", 2], tmp_path / "absent", "made with beams 3"),
        (["--length-penalty", 0], run, "made with length_penalty 0.7, and length_penalty is 0.0 now"),
        ([], other, f"made with model {run} (weights {kept['model'][:8]}), and model is {other} (weights "),
    ):
        code, said = go(2, *flags, model=model)
        assert code == 2
        assert sentence in said
        assert out.read_bytes() == content
    copy = run_folder(tmp_path / "copy")
    assert go(2, model=copy)[0] == 0, "the same weights elsewhere are the same model"
    meta.write_text(json.dumps({**kept, "max_words": 9}))
    code, said = go(3)
    assert (code, "made with max_words 9" in said) == (2, True)
    for broken in (None, "{", "[]"):
        meta.unlink() if broken is None else meta.write_text(broken)
        code, said = go(3)
        assert (code, said.count("nothing tells which model")) == (0, 1), "said and gone on"
        assert json.loads(meta.read_text()) == kept
        out.write_bytes(b"".join(out.read_bytes().splitlines(True)[:2]))
    out.unlink()
    assert go(1, "--beams", 1, model=other)[0] == 0, "a file begun anew is made by whatever makes it"
    assert json.loads(meta.read_text())["beams"] == 1


def test_rows_of_other_images_are_not_gone_on_after(run, folder, capsys, tmp_path):
    out, table = tmp_path / "out.jsonl", folder / "t.csv"
    rows = ["id,before,after", "a,0.png,0_2.png", "b,1.png,1_2.png"]
    table.write_text("\n".join(rows))
    assert caption(table, "--model", run, "--out", out) == 0
    table.write_text("\n".join([*rows[:2], "b,1.png,2_2.png", "c,2.png,2_2.png"]))
    assert caption(table, "--model", run, "--out", out) == 2
    assert f"line 2, 'b', has after {folder}/1_2.png, but the input has {folder}/2_2.png there" in capsys.readouterr().err
    table.write_text("\n".join([*rows[:2], "b,,1_2.png", "c,2.png,2_2.png"]))
    assert caption(table, "--model", run, "--out", out) == 2
    assert "a row that cannot be read" in capsys.readouterr().err


def test_a_stream_goes_on_where_its_file_ends(run, folder, expected, capsys, monkeypatch, tmp_path):
    lines = [json.dumps({"before": f"{i}.png", "after": f"{i}_2.png"}) + "\n" for i in range(6)]
    out = tmp_path / "out.jsonl"
    for given in (2, 6):
        give(monkeypatch, "".join(lines[:given]))
        assert caption("-", "--model", run, "--images", folder, "--out", out) == 0
        check(rows_of(out.read_text()), expected[:given])
    assert "captioned 4 pairs" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on(run, table, capsys, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "sub" / "out.jsonl"
    assert caption(table, "--model", run, "--out", whole, "--batch-size", 3) == 1
    assert [path.name for path in tmp_path.glob(".*")] == [".whole.jsonl.meta.json"], "no lock is left behind"
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    assert len(ends) == 8
    out.parent.mkdir()
    for size in (5, ends[3] - 1, ends[6] + 9):
        out.write_bytes(content[:size])
        assert caption(table, "--model", run, "--out", out, "--batch-size", 3) == 1
        kept = max((end for end in ends if end <= size), default=0)
        assert out.read_bytes()[:kept] == content[:kept]
        assert [row["id"] for row in rows_of(out.read_text())] == [row["id"] for row in rows_of(whole.read_text())]
        assert [row.get("caption") for row in rows_of(out.read_text())] == [row.get("caption") for row in rows_of(whole.read_text())]
    shown = capsys.readouterr().err
    assert "7 rows are there already" in shown
    assert "0 left out now and 2 earlier" in shown


@pytest.mark.slow
def test_kills_at_any_time_lose_nothing(run, tmp_path):
    """SIGKILL at five moments; the file that is there in the end is that of a run that nobody disturbed, but for rounding."""
    image_pairs(tmp_path / "pairs", 40)
    whole, out, killed = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", 0
    common = ["caption", str(tmp_path / "pairs"), "--model", str(run), "--device", "cpu", "--batch-size", "2", "--beams", "4"]
    assert main([*common, "--out", str(whole)]) == 0
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-m", "fastidc.cli", *common, "--out", str(out)], stderr=subprocess.DEVNULL)
        before, deadline = out.stat().st_size if out.exists() else 0, time.monotonic() + 60
        while attempt < 5 and process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.stat().st_size > before + 50 * attempt:
                process.kill()
                killed += 1
                break
        if process.wait(timeout=120) == 0:
            break
    assert killed >= 3, "too few kills to mean anything"
    found, expected = rows_of(out.read_text()), rows_of(whole.read_text())
    assert [(row["id"], row["caption"]) for row in found] == [(row["id"], row["caption"]) for row in expected]
    assert [row["log_prob"] for row in found] == pytest.approx([row["log_prob"] for row in expected], abs=1e-4)


def test_a_whole_file_needs_no_model(run, table, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    assert caption(table, "--model", run, "--out", out) == 1
    content = out.read_bytes()
    assert caption(table, "--model", tmp_path / "absent", "--out", out) == 1
    assert out.read_bytes() == content
    assert "captioned 0 pairs" in capsys.readouterr().err


def test_an_interrupted_run_leaves_whole_rows(run, folder, expected, capsys, tmp_path, monkeypatch):
    out, many = tmp_path / "out.jsonl", Describer.many

    def interrupted(self, *args, **options):
        with contextlib.closing(many(self, *args, **options)) as stream:
            yield next(stream)
            yield next(stream)
            raise KeyboardInterrupt

    monkeypatch.setattr(Describer, "many", interrupted)
    assert caption(folder, "--model", run, "--out", out, "--batch-size", 1) == 130
    assert "the same command goes on" in capsys.readouterr().err
    check(rows_of(out.read_text()), expected[:2])
    monkeypatch.setattr(Describer, "many", many)
    assert caption(folder, "--model", run, "--out", out) == 0
    check(rows_of(out.read_text()), expected)


def test_a_file_of_something_else_is_left_alone(run, folder, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    for content, sentence in (
        (b'{"id": "0", "caption": "x"}\n{"id": "7", "caption": "x"}\n{"to', "line 2 is of '7', but the input has '1' there"),
        (b"".join(b'{"id": "%d", "caption": "x"}\n' % i for i in range(7)), "line 7 is of '6', but the input ends before it"),
        (b'{"name": "0"}\n', "line 1 is no row of captions"),
        (b"\xff\xd8\xff\xe0\nmore", "line 1 is no row of captions"),
    ):
        out.write_bytes(content)
        assert caption(folder, "--model", tmp_path / "absent", "--out", out) == 2, "said before a model is looked for"
        assert sentence in capsys.readouterr().err
        assert out.read_bytes() == content
    assert caption(folder, "--model", run, "--out", tmp_path) == 2
    assert "--out names a file" in capsys.readouterr().err
