"""Pictures of rows: what is in them, and that the same rows give the same bytes."""

import dataclasses
from fnmatch import fnmatchcase

import torch

from bench import plot, table, waterfall
from bench.__main__ import family_of
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


def test_the_waterfall_has_its_own_order(tmp_path):
    """A feature that made things slower stays where it is; fastidc itself stands under the name of its last feature."""
    times = {"fastidc": 11.0, "fastidc +bf16": 10.0, "fastidc plain": 30.0, "B idiomatic": 20.0, "A official": 40.0}
    rows = [row(name, ms, ours="fastidc" in name, case="B/32 adapt B=128") for name, ms in times.items()]
    rows += [
        row("fastidc", 70.0, ours=True, case="B/32 adapt B=max", batch=3072),
        row("A official", 90.0, case="B/32 adapt B=max", batch=1536),
    ]
    write(tmp_path / "results" / "gpu-x", rows)
    assert plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "docs")]) == 0
    falls = (tmp_path / "docs" / "bench-gpu-x-train_step-waterfall.svg").read_text()
    places = [
        falls.index(name)
        for name in ("A official", "B idiomatic", "fastidc plain", "fastidc +bf16", waterfall.last_feature("adapt", True, "cuda"))
    ]
    assert places == sorted(places)
    assert "0.91x" in falls
    assert "B=max" not in falls, "features are shown where they were measured"
    assert "fastidc plain" not in (tmp_path / "docs" / "bench-gpu-x-train_step.svg").read_text()


def test_the_cases_of_a_picture_are_the_papers():
    sizes = [f"{shape} n={n}" for n in (16, 1024) for shape in ("intra B/16 L=197 H=12", "text L=32 H=8 causal", "intra B/32 L=50 H=12")]
    rows = [{"case": name} for name in sizes]
    assert plot.shown("attention", rows) == ["intra B/32 L=50 H=12 n=1024", "text L=32 H=8 causal n=1024"]
    assert plot.shown("attention", rows[:3]) == sizes[:3], "without those, the first there are"


def test_every_shown_case_exists():
    for family, patterns in plot.SHOWN.items():
        module = family_of(family)
        names = [{"case": case.name} for case in module.cases("paper", "cpu", torch.bfloat16)]
        for pattern in patterns:
            assert any(fnmatchcase(name["case"], pattern) for name in names), (family, pattern)


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
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"bench-cpu-train_step.svg", "bench-cpu-train_step-waterfall.svg"}
    falls = (tmp_path / "docs" / "bench-cpu-train_step-waterfall.svg").read_text()
    assert "1.70x" in falls, "in units of A's time"
    assert "A official = 1" in falls


def test_refusals(tmp_path, capsys):
    assert plot.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no rows to draw" in capsys.readouterr().err
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "a.csv").write_text("name,price\nbread,2\n")
    assert plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path)]) == 2
    assert "a.csv: not a file of bench rows" in capsys.readouterr().err
