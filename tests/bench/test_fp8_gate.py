"""The accuracy gate of FP8: its arithmetic, its verdicts, and that it runs."""

import csv

import pytest
import torch

from bench.fp8 import SCORES, T_975, interval, judge, main, world, write_csv
from fastidc.errors import FastidcError

BF16 = [30.0, 32.0, 31.0, 33.0, 29.0]  # mean 31, deviation sqrt(2.5): 31 +- 2.776 * 0.7071


def test_interval():
    mean, low, high = interval(BF16)
    assert (mean, low, high) == pytest.approx((31.0, 31 - 2.776 * 0.5**0.5, 31 + 2.776 * 0.5**0.5))
    assert interval([4.0, 4.0]) == (4.0, 4.0, 4.0)


def test_the_factors_are_student_s():
    """Shares of Student's distribution within the factors, by its density on a fine grid."""
    for freedom, factor in T_975.items():
        t = torch.linspace(0, factor, 200_001, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(t).exp()
        assert 2 * float(torch.trapezoid(density, t)) == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(
    ("shift", "verdict", "passed"),
    [(0.0, "inside", True), (-1.9, "inside", True), (-2.0, "below", False), (1.9, "inside", True), (2.0, "above", True)],
)
def test_verdict(shift, verdict, passed):
    answer = judge("R@1", BF16, [score + shift for score in BF16])
    assert (answer.verdict, answer.passed) == (verdict, passed)
    assert answer.difference == pytest.approx(shift)
    assert answer.difference_high == pytest.approx(shift), "paired: every seed moves by the same"
    assert verdict in answer.line()


def test_a_loss_within_the_noise_of_seeds_is_shown():
    answer = judge("CIDEr", BF16, [29.0, 31.5, 30.5, 31.0, 29.0])
    assert answer.verdict == "inside"
    assert answer.difference == pytest.approx(-0.8)
    assert answer.difference_low < -0.8 < answer.difference_high
    assert "paired difference -0.8 (" in answer.line()


@pytest.mark.parametrize(
    ("bf16", "fp8", "sentence"),
    [
        ([1.0], [1.0], "an interval needs 2 to 10 seeds, got 1"),
        ([1.0] * 11, [1.0] * 11, "an interval needs 2 to 10 seeds, got 11"),
        ([1.0, 2.0], [1.0], "2 runs in bf16 and 1 in FP8"),
        ([1.0, float("nan")], [1.0, 2.0], "a score is not finite"),
        ([1.0, 2.0], [1.0, float("nan")], "a score is not finite"),
    ],
)
def test_refusals(bf16, fp8, sentence):
    with pytest.raises(FastidcError, match=sentence):
        judge("R@1", bf16, fp8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "1"], "an interval needs 2 to 10 seeds, got 1."),
        (["--steps", "0", "3"], "--steps must be at least 1, got 0."),
        (["--wrong"], "`python -m bench.fp8 --help` lists the options."),
    ],
)
def test_command_refuses_in_a_sentence(arguments, sentence, capsys, tmp_path):
    assert main([*arguments, "--device", "cpu", *([] if arguments == ["--wrong"] else ["--out", str(tmp_path / "out")])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.fp8: ")
    assert err.endswith(f"{sentence}\n")
    assert not (tmp_path / "out").exists()


def test_another_world(tmp_path):
    (tmp_path / "render.json").write_text('{"config": {}}', encoding="utf-8")
    with pytest.raises(FastidcError, match="holds another world than this gate's"):
        world(tmp_path, {})


def test_csv(tmp_path):
    write_csv(tmp_path / "a.csv", [{"kind": "bf16", "R@1": 1 / 3}])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "kind,R@1\nbf16,0.333333\n"


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    """Every run's scores and both verdicts are written; the exit code is the verdict's."""
    code = main(["--smoke", "--device", "cpu", "--out", str(tmp_path)])
    runs, verdicts = (list(csv.DictReader((tmp_path / name).open())) for name in ("runs.csv", "verdict.csv"))
    assert [(row["kind"], row["seed"]) for row in runs] == [("bf16", "0"), ("fp8", "0"), ("bf16", "1"), ("fp8", "1")]
    assert all(float(row[name]) >= 0 for row in runs for name in SCORES)
    assert [row["score"] for row in verdicts] == list(SCORES)
    assert code == int(any(row["verdict"] == "below" for row in verdicts))
    assert "the scores mean nothing" in capsys.readouterr().out
