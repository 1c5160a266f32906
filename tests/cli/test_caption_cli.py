"""`fastidc caption` as a user meets it: a pair, many, a stream, a run that was killed, and what is wrong."""

import json

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from caption_cases import caption, check, give, make_expected, make_folder, make_run, make_table, rows_of  # noqa: F401
from describe.cases import run_folder

from fastidc import Describer


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
    greedy = Describer(run, "cpu", 1, length_penalty=0.0)(*pair)
    assert greedy.caption != Describer(run, "cpu", 3)(*pair).caption
    assert caption(*pair, "--model", run, "--beams", 1) == 0
    assert capsys.readouterr().out == greedy.caption + "\n"
    assert caption(*pair, "--model", run, "--beams", 1, "--length-penalty", 2) == 2
    assert "length_penalty 2.0 chooses among beams" in capsys.readouterr().err


@pytest.mark.parametrize("penalty", [None, 0.0, 2.0])
def test_the_length_penalty_reaches_the_model(run, folder, capsys, monkeypatch, penalty):
    given, made = [], Describer.__init__

    def noted(self, *args, **options):
        made(self, *args, **options)
        given.append(self.length_penalty)

    monkeypatch.setattr(Describer, "__init__", noted)
    flags = [] if penalty is None else ["--length-penalty", penalty]
    assert caption(folder / "0.png", folder / "0_2.png", "--model", run, *flags) == 0
    assert given == [0.7 if penalty is None else penalty]


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


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_bad_line_costs_itself_only(run, folder, expected, capsys, monkeypatch, tmp_path, batch_size):
    good = [json.dumps({"before": f"{i}.png", "after": f"{i}_2.png", "id": f"n{i}"}).encode() for i in range(6)]
    lines = [b"\xff", *good[:2], b"{torn", b"[1]", b'{"id": "x", "before": "0.png"}', *good[2:], good[0].replace(b"0_2", b"1_2"), b"{"]
    out, text = tmp_path / "out.jsonl", b"\n".join(lines)
    give(monkeypatch, text)
    assert caption("-", "--model", run, "--images", folder, "--batch-size", batch_size) == 1
    shown = capsys.readouterr()
    rows = rows_of(shown.out)
    assert [row["id"] for row in rows] == ["line 1", "n0", "n1", "line 4", "line 5", "x", "n2", "n3", "n4", "n5", "line 11", "line 12"]
    check([row for row in rows if "error" not in row], expected)
    assert rows[0]["error"].startswith("standard input: line 1 is not UTF-8 text")
    assert "line 4 is left out: standard input: line 4 cannot be read as JSON" in shown.err
    assert "captioned 6 pairs" in shown.err
    assert "6 left out" in shown.err
    for count in (4, 12):  # gone on after
        give(monkeypatch, b"\n".join(lines[:count]))
        assert caption("-", "--model", run, "--images", folder, "--out", out) == 1
    assert [row["id"] for row in rows_of(out.read_text())] == [row["id"] for row in rows]


def test_a_bad_row_of_a_table_costs_itself_only(run, folder, expected, capsys):
    table = folder / "bad.csv"
    rows = [f"n{i},{i}.png,{i}_2.png" for i in range(6)]
    table.write_bytes("\n".join(["id,before,after", rows[0], "n9,0.png", *rows[1:3], "e,,1.png", *rows[3:]]).encode() + b"\nf,\xe9,g\n")
    assert caption(table, "--model", run) == 1
    shown = capsys.readouterr()
    found = rows_of(shown.out)
    assert [row["id"] for row in found] == ["n0", "line 3", "n1", "n2", "e", "n3", "n4", "n5", "line 10"]
    check([row for row in found if "error" not in row], expected)
    assert f"{table}: line 3 has 2 cells" in found[1]["error"]
    assert "line 3 is left out: " in shown.err
    assert "3 left out" in shown.err
    table.write_text("before,then\n0.png,0_2.png\n")
    assert caption(table, "--model", run) == 2, "nothing of it can be read"
    assert capsys.readouterr().out == ""


def test_rows_are_lines_to_whoever_splits_them(run, folder, capsys, monkeypatch):
    name = "a\x85b\u2028c\u2029d\x0b\x1ee"
    give(monkeypatch, json.dumps({"id": name, "before": "0.png", "after": "0_2.png"}) + "\n")
    assert caption("-", "--model", run, "--images", folder) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["id"] == name
    assert r"a\u0085b\u2028c\u2029d" in line


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


def test_nothing_is_written_where_the_model_is_missing(folder, capsys, tmp_path):
    assert caption(folder, "--model", tmp_path / "absent", "--out", tmp_path / "out.jsonl") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["{0}/0.png"], "is alone"),
        (["{0}/0.png", "{0}/absent.png"], "absent.png: no such image"),
        (["{0}/0.png", "{0}"], "is a folder; name an image in it"),
        (["{0}/0.png", "{0}/0_2.png", "--length-penalty", "nan"], "length_penalty"),
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
