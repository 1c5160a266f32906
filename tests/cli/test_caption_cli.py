"""`fastidc caption` as a user meets it: a pair, many, a stream, a run that was killed, and what is wrong."""

import contextlib
import io
import json
import subprocess
import sys
import time
import types

import pytest
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from describe.cases import image_pairs, run_folder

from fastidc import Describer
from fastidc.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs without captions."""
    root = tmp_path_factory.mktemp("pairs")
    image_pairs(root, 6)
    return root


@pytest.fixture(scope="module")
def expected(run, folder):
    """The rows of the folder's pairs, each captioned alone."""
    describer = Describer(run, "cpu")
    return [describer(folder / f"{i}.png", folder / f"{i}_2.png") for i in range(6)]


def caption(*argv):
    return main(["caption", *map(str, argv), "--device", "cpu"])


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def check(rows, expected):
    assert len(rows) == len(expected)
    for row, found in zip(rows, expected, strict=True):
        assert row["caption"] == found.caption
        assert row["log_prob"] == pytest.approx(found.log_prob, abs=1e-4)
        assert row["p_change"] == pytest.approx(found.p_change, abs=1e-6)
        assert (row["before"], row["after"]) == (str(found.before), str(found.after))


def test_one_pair(run, folder, expected, capsys, tmp_path):
    first = expected[0]
    assert caption(first.before, first.after, "--model", run) == 0
    shown = capsys.readouterr()
    assert shown.out == first.caption + "\n", "nothing but the caption, for a shell to take"
    assert "p(change)" in shown.err
    assert caption(first.before, first.after, "--model", run, "--json") == 0
    check(rows_of(capsys.readouterr().out), [first])
    pytest.importorskip("matplotlib", reason="figures need matplotlib: install it")
    assert caption(first.before, first.after, "--model", run, "--figure", tmp_path / "pair.png") == 0
    assert (tmp_path / "pair.png").read_bytes()[:4] == b"\x89PNG"


def test_beams_reach_the_model(run, folder, capsys):
    pair = folder / "0.png", folder / "0_2.png"
    greedy = Describer(run, "cpu", 1)(*pair)
    assert greedy.caption != Describer(run, "cpu", 3)(*pair).caption
    assert caption(*pair, "--model", run, "--beams", 1) == 0
    assert capsys.readouterr().out == greedy.caption + "\n"


def test_the_model_is_named_where_none_is_given(run, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTIDC_MODEL", raising=False)
    pair = folder / "0.png", folder / "0_2.png"
    assert caption(*pair) == 2
    assert "no model is named" in capsys.readouterr().err
    monkeypatch.setenv("FASTIDC_MODEL", str(run))
    assert caption(*pair) == 0
    assert f"no --model is given, so {run} is used." in capsys.readouterr().err
    monkeypatch.delenv("FASTIDC_MODEL")
    run_folder(tmp_path / "runs" / "demo" / "finetune")
    assert caption(*pair) == 0
    assert "runs/demo/finetune is used" in capsys.readouterr().err


def test_a_folder_streams_rows(run, folder, expected, capsys):
    assert caption(folder, "--model", run, "--batch-size", 4) == 0
    shown = capsys.readouterr()
    rows = rows_of(shown.out)
    check(rows, expected)
    assert [row["id"] for row in rows] == [str(i) for i in range(6)]
    assert "pair/s" in shown.err
    assert "captioned 6 pairs" in shown.err
    assert "0 left out" in shown.err


def test_standard_input_is_a_table(run, folder, expected, capsys, monkeypatch):
    lines = [{"before": f"{i}.png", "after": f"{i}_2.png", "id": f"n{i}"} for i in range(6)]
    give(monkeypatch, "".join(json.dumps(line) + "\n" for line in lines))
    assert caption("-", "--model", run, "--images", folder, "--batch-size", 2) == 0
    rows = rows_of(capsys.readouterr().out)
    check(rows, expected)
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    give(monkeypatch, json.dumps(lines[0]) + "\n{torn\n")
    assert caption("-", "--model", run, "--images", folder) == 2
    shown = capsys.readouterr()
    check(rows_of(shown.out), expected[:1])
    assert "standard input: line 2 cannot be read as JSON" in shown.err
    give(monkeypatch, b"\xff\n")
    assert caption("-", "--model", run) == 2
    assert "line 1 is not UTF-8" in capsys.readouterr().err


def test_a_stream_goes_on_where_its_file_ends(run, folder, expected, capsys, monkeypatch, tmp_path):
    lines = [json.dumps({"before": f"{i}.png", "after": f"{i}_2.png"}) + "\n" for i in range(6)]
    out = tmp_path / "out.jsonl"
    for given in (2, 6):
        give(monkeypatch, "".join(lines[:given]))
        assert caption("-", "--model", run, "--images", folder, "--out", out) == 0
        check(rows_of(out.read_text()), expected[:given])
    assert "captioned 4 pairs" in capsys.readouterr().err


def give(monkeypatch, text):
    """``text`` on standard input."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))


@pytest.fixture
def table(folder, tmp_path):
    """The folder's pairs as a table, two of them with a bad image."""
    worlds.noise_image(tmp_path / "whole.png", 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    lines = ["id,before,after", *(f"n{i},{folder}/{i}.png,{folder}/{i}_2.png" for i in range(6))]
    lines[2:2] = [f"cut,{tmp_path}/cut.png,{folder}/0.png"]
    lines[5:5] = [f"gone,{folder}/0.png,{folder}/absent.png"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    return tmp_path / "t.csv"


def test_bad_images_cost_their_pairs_only(run, table, expected, capsys):
    assert caption(table, "--model", run, "--batch-size", 3) == 1
    shown = capsys.readouterr()
    rows = rows_of(shown.out)
    bad = [row for row in rows if "error" in row]
    assert [row["id"] for row in rows] == ["n0", "cut", "n1", "n2", "gone", "n3", "n4", "n5"]
    check([row for row in rows if "error" not in row], expected)
    assert [set(row) for row in bad] == [{"id", "error"}] * 2
    assert "cut.png: cannot be read as an image" in bad[0]["error"]
    assert "absent.png: no such image" in bad[1]["error"]
    for row in bad:
        assert f"{row['id']} is left out: {row['error']}" in shown.err
    assert "captioned 6 pairs" in shown.err
    assert "2 left out" in shown.err


def test_a_run_that_was_killed_goes_on(run, table, capsys, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "sub" / "out.jsonl"
    assert caption(table, "--model", run, "--out", whole, "--batch-size", 3) == 1
    assert [path.name for path in tmp_path.glob(".*")] == [], "no lock is left behind"
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


def test_nothing_is_written_where_the_model_is_missing(folder, capsys, tmp_path):
    assert caption(folder, "--model", tmp_path / "absent", "--out", tmp_path / "out.jsonl") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["{0}/0.png"], "is alone"),
        (["{0}/0.png", "{0}/absent.png"], "absent.png: no such image"),
        (["{0}/0.png", "{0}"], "no such image"),
        (["{0}/absent.csv"], "no such data folder or table"),
        (["{0}", "--figure", "x.png"], "--figure belongs to one pair"),
        (["{0}", "--json"], "--json belongs to one pair"),
        (["{0}/0.png", "{0}/0_2.png", "--out", "x.jsonl"], "--out belongs to many pairs"),
        (["{0}/0.png", "{0}/0_2.png", "--split", "test"], "--split belongs to many pairs"),
        (["{0}/0.png", "{0}/0_2.png", "--figure", "x.docx"], "x.docx"),
        (["{0}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["-", "--split", "test"], "a stream has no splits"),
        (["{0}/0.png", "{0}/0_2.png", "--beams", "0"], "beams"),
        (["{0}", "--workers", "0"], "workers"),
    ],
)
def test_wrong_input_is_a_sentence(run, folder, capsys, argv, sentence):
    assert caption(*(word.format(folder) for word in argv), "--model", run) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastidc: ")
    assert sentence in error


def test_an_adapted_run_is_a_sentence(folder, capsys, tmp_path):
    adapted = run_folder(tmp_path / "adapt", captioner=False)
    assert caption(folder, "--model", adapted, "--out", tmp_path / "out.jsonl") == 2
    assert f"{adapted}: this model has no captioner" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("command", ["caption", "search"])
def test_help_fits_a_screen_and_shows_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"Example: fastidc {command} ") for line in lines)
    assert any("Exit codes: 0" in line for line in lines)
