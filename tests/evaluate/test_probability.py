import numpy as np
import pytest

from fastidc.errors import FastidcError
from fastidc.evaluate.probability import Calibration, auc, calibrate, calibration_error


def test_auc_counts_pairs_and_halves_ties():
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 6, 200) / 5, rng.integers(0, 2, 200)
    positive, negative = values[labels == 1], values[labels == 0]
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    assert auc(values, labels) == wins / (len(positive) * len(negative))
    assert auc([0.9, 0.1], [True, False]) == 1.0
    assert auc([0.5] * 4, [1, 0, 0, 1]) == 0.5


def test_calibration_error_is_the_mean_gap_of_the_bins():
    values, labels = [0.05, 0.05, 0.95, 1.0, 0.5, 0.5], [0, 1, 1, 1, 1, 0]
    # bins of 15: {0.05, 0.05}, {0.95, 1.0}, {0.5, 0.5}
    assert calibration_error(values, labels) == pytest.approx((abs(0.1 - 1) + abs(1.95 - 2) + abs(1.0 - 1)) / 6, abs=1e-12)
    assert calibration_error([0.0, 1.0], [False, True]) == 0.0
    assert calibration_error([1 / 3 - 1e-9, 1 / 3 + 1e-9], [1, 0], bins=3) > 0.3  # on both sides of an edge


def test_calibration_finds_the_scale_and_the_shift():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 40_000)
    labels = rng.random(40_000) < 1 / (1 + np.exp(-(0.4 * logits - 0.7)))
    found = calibrate(1 / (1 + np.exp(-logits)), labels)
    assert (found.scale, found.shift) == (pytest.approx(0.4, abs=0.02), pytest.approx(-0.7, abs=0.04))
    values = 1 / (1 + np.exp(-logits))
    assert calibration_error(found(values), labels) < 0.02 < calibration_error(values, labels)
    assert auc(found(values), labels) == pytest.approx(auc(values, labels), abs=1e-9)


def test_calibration_is_the_minimum():
    rng = np.random.default_rng(2)
    values = rng.random(300)
    labels = rng.random(300) < values**2
    best = calibrate(values, labels)
    positive, negative = labels.sum(), (~labels).sum()
    targets = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(scale, shift):
        p = Calibration(scale, shift)(values)
        return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum()

    here = loss(best.scale, best.shift)
    assert all(loss(best.scale + a, best.shift + b) >= here - 1e-9 for a in (-1e-3, 0, 1e-3) for b in (-1e-3, 0, 1e-3))


def test_separated_and_equal_probabilities_have_a_finite_calibration():
    found = calibrate([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1])
    assert np.isfinite([found.scale, found.shift]).all()
    assert found([1.0])[0] > 0.7 > 0.3 > found([0.0])[0]
    equal = calibrate([0.9] * 4, [1, 0, 0, 0])
    assert equal([0.9])[0] == pytest.approx((2 / 3 + 3 * 0.2) / 4, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0.1, 0.2], [1, 1]), "only one kind"),
        (lambda: calibrate([0.1, 0.2], [0, 0]), "only one kind"),
        (lambda: auc([0.1, float("nan")], [0, 1]), r"probabilities\[1\] is nan"),
        (lambda: calibration_error([0.1, 1.2], [0, 1]), r"probabilities\[1\] is 1.2"),
        (lambda: calibration_error([0.1, 0.2], [0, 2]), r"changed\[1\]"),
        (lambda: calibration_error([0.1], [0, 1]), "1 probabilities and 2 labels"),
        (lambda: calibration_error([0.1], [0], bins=0), "0 bins"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(FastidcError, match=message):
        call()
