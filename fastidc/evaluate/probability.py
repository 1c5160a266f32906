"""How good a probability of change is: whether it ranks (AUC), whether it means what it says (calibration error), and how to make it so.

Pure functions of numpy arrays. ``probabilities`` [N] lie in 0 to 1, ``changed`` [N] is true where the pair has a change. Each raises
FastidcError that names the index where a value is none of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastidc.errors import FastidcError

BINS = 15
_CLOSEST = 1e-7  # to 0 and 1, before the logit: about what fp32 can tell from them
_STEPS = 100


def auc(probabilities: Any, changed: Any) -> float:
    """Area under the ROC curve: the share of (changed, unchanged) pairs of pairs that are ranked rightly, a tie counting half, exactly.

    Raises FastidcError also where all or none are changed.
    """
    values, labels = _checked(probabilities, changed)
    positive, negative = values[labels], np.sort(values[~labels])
    if not len(positive) or not len(negative):
        raise FastidcError("AUC compares pairs with a change to pairs without one, and there is only one kind; give both.")
    below = np.searchsorted(negative, positive, side="left").sum()
    up_to = np.searchsorted(negative, positive, side="right").sum()
    return int(below + up_to) / (2 * len(positive) * len(negative))


def calibration_error(probabilities: Any, changed: Any, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), 0 to 1: how far a bin's mean probability is from its share of
    changed pairs, averaged over the pairs. ``bins`` of equal width, [a, b), the last one with 1."""
    if bins < 1:
        raise FastidcError(f"a calibration error cannot have {bins} bins; give at least 1.")
    values, labels = _checked(probabilities, changed)
    place = np.minimum((values * bins).astype(np.int64), bins - 1)
    surplus = np.bincount(place, weights=values - labels, minlength=bins)
    return float(np.abs(surplus).sum() / len(values))


@dataclass(frozen=True)
class Calibration:
    """p -> sigmoid(scale * logit(p) + shift): Platt's scaling. A scale of 1 / T and no shift is a temperature T."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, probabilities: Any) -> np.ndarray:
        """Calibrated probabilities, float64 of the same shape. Order is kept where the scale is positive."""
        return _sigmoid(self.scale * _logit(np.asarray(probabilities, dtype=np.float64)) + self.shift)


def calibrate(probabilities: Any, changed: Any) -> Calibration:
    """The `Calibration` with the least cross entropy on these pairs, which should be of val: logistic regression on the logit by Newton.

    Labels are Platt's (1999), (n + 1) / (n + 2) and 1 / (n + 2) instead of 1 and 0: pairs that a threshold separates without error would
    have no finite optimum. Raises FastidcError also where all or none are changed.
    """
    values, labels = _checked(probabilities, changed)
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        raise FastidcError("a calibration needs pairs with a change and pairs without one, and there is only one kind; give both.")
    targets = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
    inputs = np.column_stack([_logit(values), np.ones(len(values))])
    weights = np.array([1.0, 0.0])
    loss = _cross_entropy(inputs @ weights, targets)
    for _ in range(_STEPS):
        predicted = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (predicted - targets)
        hessian = inputs.T @ (inputs * (predicted * (1 - predicted))[:, None])
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]  # of equal probabilities all scales serve: the shortest step
        size = 1.0
        while (new := _cross_entropy(inputs @ (weights - size * step), targets)) > loss and size > 1e-10:
            size /= 2
        if new >= loss - 1e-15 * len(values):
            break
        weights, loss = weights - size * step, new
    return Calibration(float(weights[0]), float(weights[1]))


def _checked(probabilities: Any, changed: Any) -> tuple[np.ndarray, np.ndarray]:
    values, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(changed)
    if values.ndim != 1 or labels.shape != values.shape or not len(values):
        raise FastidcError(f"there are {values.size} probabilities and {labels.size} labels; give two lists of the same length, not empty.")
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(bad):
        raise FastidcError(f"probabilities[{bad[0]}] is {values[bad[0]]}; every one has to lie in 0 to 1.")
    wrong = np.flatnonzero(~np.isin(labels, (0, 1)))
    if len(wrong):
        raise FastidcError(f"changed[{wrong[0]}] is {labels[wrong[0]]!r}; every one has to be true or false.")
    return values, labels.astype(bool)


def _logit(values: np.ndarray) -> np.ndarray:
    inside = np.clip(values, _CLOSEST, 1 - _CLOSEST)
    return np.log(inside) - np.log1p(-inside)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -values))


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())
