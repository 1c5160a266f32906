"""Pictures of rows: what is in them, and that the same rows give the same bytes."""

import dataclasses

from bench import plot, table
from bench.case import Row


def row(variant, ms, *, ours=False, case="adapt B=64", **more):
    base = Row(
        "train_step", case, variant, ours, "step", "bf16", "GPU X", ms=ms, ms_p20=0.9 * ms, ms_p80=1.1 * ms, percent_of_floor=50.0 * 10 / ms
    )
    return dataclasses.replace(base, unit="pairs", rate=64e3 / ms, torch="2.11", commit="abc1234", date="2026-11-21", **more)


def write(folder, rows, name="2026-11-21-train_step.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(table.csv_text(rows))


def test_bars_scaling_and_waterfall(tmp_path):
    rows = [row(v, ms, ours=v == "fastidc") for v, ms in (("A official", 40.0), ("B idiomatic", 20.0), ("fastidc", 10.0))]
    rows += [row(v, ms, ours=v == "fastidc", case="adapt B=512") for v, ms in (("A official", 90.0), ("fastidc", 45.0))]
    rows.append(Row("train_step", "adapt B=64", "C absent", False, "step", "bf16", "GPU X", status="missing", note="it is not installed."))
    write(tmp_path / "results" / "gpu-x", rows)
    assert plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "docs")]) == 0
    names = {path.name for path in (tmp_path / "docs").iterdir()}
    assert names == {f"bench-gpu-x-{name}.svg" for name in ("train_step", "train_step-scaling", "train_step-waterfall")}
    bars = (tmp_path / "docs" / "bench-gpu-x-train_step.svg").read_text()
    for word in ("fastidc", "B idiomatic", "floor", "GPU X", "abc1234"):
        assert f"<!-- {word}" in bars or word in bars, word
    assert "C absent" not in bars, "what has no time is no bar"
    assert "2.00x" in (tmp_path / "docs" / "bench-gpu-x-train_step-waterfall.svg").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "docs")]) == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}


def test_a_cpu_has_ratios_and_no_times(tmp_path):
    def ratio(variant, value, baseline):
        base = Row("train_step", "adapt B=2", variant, variant == "fastidc", "step", "fp32", "cpu, 2 threads", baseline=baseline)
        return dataclasses.replace(base, ratio=value, ratio_p20=value, ratio_p80=value)

    rows = [ratio("A official", 1.0, "A official"), ratio("fastidc", 1.7, "A official"), ratio("fastidc", 1.2, "B idiomatic")]
    write(tmp_path / "results" / "cpu", rows)
    assert plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "docs")]) == 0
    text = (tmp_path / "docs" / "bench-cpu-train_step.svg").read_text()
    assert "times as fast as A official" in text
    assert "ratios within one run" in text
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["bench-cpu-train_step.svg"]


def test_refusals(tmp_path, capsys):
    assert plot.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no rows to draw" in capsys.readouterr().err
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "a.csv").write_text("name,price\nbread,2\n")
    assert plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path)]) == 2
    assert "a.csv: not a file of bench rows" in capsys.readouterr().err
