"""Going on from an earlier run's rows: what counts as answered, and what is not tried again."""

import csv
import dataclasses

import pytest
import torch
from test_harness import CASE, FAST, PLAIN, square

from bench import earlier, harness, table
from bench.__main__ import main
from bench.case import LOST, SKIPPED, Row, Variant
from bench.failures import DeviceLostError
from bench.harness import measure
from fastidc.errors import FastidcError


def written(tmp_path, *rows):
    (tmp_path / "rows.csv").write_text(table.csv_text(rows))
    return tmp_path / "rows.csv"


def row(variant, case="square", device="test", **more):
    return Row("toy", case, variant, False, "both", "float32", device, **more)


def test_a_case_is_answered_when_all_its_variants_are(tmp_path):
    path = written(
        tmp_path, row("plain"), row("peer", status=SKIPPED, note="left out by --skip."), row("bad", status=LOST, note="it broke.")
    )
    found = earlier.read(path, "test")
    assert found.has(CASE, ["plain", "bad"])
    assert not found.has(CASE, ["plain", "peer"]), "what was left out on purpose can still be asked"
    assert not found.has(dataclasses.replace(CASE, dtype=torch.bfloat16), ["plain"])
    assert found.broke(CASE, "bad") == "it broke."
    assert found.broke(CASE, "plain") is None
    assert not earlier.read(None, "test").answers
    assert not earlier.read(tmp_path / "none.csv", "test").answers
    with pytest.raises(FastidcError, match="its rows are of test, and this is GPU X"):
        earlier.read(path, "GPU X")


def test_a_variant_that_broke_two_cases_is_left_out_of_all(tmp_path):
    path = written(tmp_path, *(row("bad", case=name, status=LOST, note="it broke.") for name in ("a", "b")))
    found = earlier.read(path, "test")
    assert found.broke(CASE, "bad") == "it left the device unusable at a, b."
    rows = measure(CASE, [PLAIN, Variant("bad", lambda case: square)], dataclasses.replace(FAST, earlier=found))
    assert {(row.variant, row.status) for row in rows} == {("plain", "ok"), ("bad", "lost")}


def test_losing_the_device_says_who_and_keeps_what_there_was(monkeypatch):
    def check(case, variant):
        if variant == "bad":
            raise DeviceLostError("bad left the device unusable.", variant)

    monkeypatch.setattr(harness, "check_device", check)
    variants = [PLAIN, Variant("picky", lambda case: square, lambda case: ["it takes cubes only."]), Variant("bad", lambda case: square)]
    with pytest.raises(DeviceLostError) as lost:
        measure(CASE, variants, FAST)
    assert [(row.variant, row.status) for row in lost.value.rows] == [("picky", "unsupported"), ("bad", "lost")]


def test_the_command_skips_what_is_answered(tmp_path, capsys):
    arguments = ["layer_norm", "--smoke", "--cpu", "--csv"]
    assert main([*arguments, str(tmp_path / "one"), "--skip", "tiny M=12 C=32::add + F.layer_norm compiled"]) == 0
    (first,) = (tmp_path / "one").rglob("*.csv")
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "two"), "--done", str(first)]) == 0
    out = capsys.readouterr().out
    assert out.count("answered by an earlier run") == 1, "one case has a variant that was left out, and is asked again"
    (second,) = (tmp_path / "two").rglob("*.csv")
    assert "residual" not in second.read_text()
    assert main([*arguments, str(tmp_path / "three"), "--done", str(second), "--skip", "nobody"]) == 0
    assert main(["layer_norm", "--smoke", "--cpu", "--done", str(tmp_path)]) == 0, "no file, no rows"


def test_a_family_that_lost_the_device_goes_on_in_another_process(tmp_path, monkeypatch, capsys):
    def check(case, variant):
        if variant == "index + F.unfold":
            raise DeviceLostError("it left the device unusable.", variant)

    monkeypatch.setattr(harness, "check_device", check)
    assert main(["patches", "--smoke", "--cpu", "--csv", str(tmp_path / "one")]) == 2
    assert capsys.readouterr().err == "bench: it left the device unusable.\n"
    (first,) = (tmp_path / "one").rglob("*.csv")
    assert main(["patches", "--smoke", "--cpu", "--csv", str(tmp_path / "two"), "--done", str(first)]) == 0
    (second,) = (tmp_path / "two").rglob("*.csv")
    with second.open(newline="") as file:
        found = {row["variant"]: (row["status"], row["note"]) for row in csv.DictReader(file)}
    assert found["index + F.unfold"] == (LOST, "it left the device unusable.")
    assert found["index + view"][0] == "ok"
