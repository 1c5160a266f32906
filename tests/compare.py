"""The only place with tolerances."""

import torch
from torch import Tensor

GOLDEN_FORWARD = 2e-5  # relative norm, against the official code's fp32
GOLDEN_GRAD_NORM = 5e-4  # relative, per parameter
GOLDEN_GRAD_NORM_FLOOR = 1e-6  # of the global norm: key biases have a true gradient of 0
GOLDEN_TRAIN_LOSS = 1e-5
GOLDEN_TRAIN_AFTER = 1e-4
FP32_MODEL = 2e-5  # model against reference in fp32
FP64_MODEL = 1e-10  # model against reference in fp64
FP64_OP = 1e-12
FP32_OP = 2e-6


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, norms over everything; the absolute norm where expected is 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    scale = expected.norm()
    return float((actual - expected).norm() / (scale if scale > 0 else 1))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g} exceeds {tolerance:.3g}"


def assert_grad_norms(actual: dict[str, Tensor], expected: dict[str, float]) -> None:
    """Each named gradient's norm within the golden tolerance."""
    total = sum(value**2 for value in expected.values()) ** 0.5
    for name, value in expected.items():
        got = float(torch.linalg.vector_norm(actual[name].double()))
        allowed = max(GOLDEN_GRAD_NORM * value, GOLDEN_GRAD_NORM_FLOOR * total)
        assert abs(got - value) <= allowed, f"gradient norm of {name} is {got:.6g}, expected {value:.6g} (allowed {allowed:.2g})"
