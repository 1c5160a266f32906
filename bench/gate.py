"""Correctness before speed: every output and every gradient of a variant against float64, or no time is printed."""

import torch
from torch import Tensor

from bench.case import Case, Inputs, Variant, Verdict, cotangents, mapped, tensors_of, widened

FACTOR = 2.0  # of the error that honest PyTorch makes in the same dtype
# Below these a relative error is the rounding of a result, or of a sum in another order. bf16 and fp16 round by 2^-9 and 2^-12.
ABSOLUTE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
ALONE = 4.0  # times as much for a single number, whose rounding nothing averages: a loss that a peer returns in bf16, log_softmax in bf16
SEED = 0


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over everything; the absolute norm where the truth is 0. NaN stays NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        return float("nan")
    scale = float(expected.norm())
    return float((actual - expected).norm()) / (scale if scale > 0 else 1.0)


def leaves(case: Case, inputs: Inputs) -> Inputs:
    """The inputs, with fresh leaves for those that want gradients."""
    return {name: value.detach().requires_grad_() if name in case.gradients else value for name, value in inputs.items()}


def values(case: Case, function, inputs: Inputs, upstream: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name: "output 0", "d qkv"."""
    inputs = leaves(case, inputs)
    with torch.set_grad_enabled(bool(case.gradients)):
        outputs = tensors_of(function(**inputs))
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    if case.gradients:
        upstream = [up.to(output.dtype) for up, output in zip(upstream, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, [inputs[name] for name in case.gradients], upstream)
        found |= {f"d {name}": grad for name, grad in zip(case.gradients, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def floor(case: Case, truth: Tensor) -> float:
    """The limit below which no error counts."""
    return ABSOLUTE[case.dtype] * (ALONE if truth.numel() == 1 else 1.0)


class Gate:
    """The truth of a case, worked out once, and the limit for each of its quantities."""

    def __init__(self, case: Case):
        self.case, self.rows = case, None
        if case.check is not None:
            return
        self.inputs = case.make_inputs(case.device, case.dtype, SEED) | dict(case.gate_inputs)
        self.upstream = cotangents(case)
        if case.per_row:
            count = len(self.inputs[case.per_row[0]])
            if count > case.gate_rows:  # spread over all, the first and the last among them: where grids end and indices overflow
                self.rows = torch.linspace(0, count - 1, case.gate_rows, device=case.device).round().long()
        self.some, self.some_upstream = self.inputs, self.upstream
        if self.rows is not None:
            self.some = {name: value[self.rows] if name in case.per_row else value for name, value in self.inputs.items()}
            self.some_upstream = [up[self.rows] for up in self.upstream]
        self.truth = self._truth(case.exact)
        plain = values(case, case.plain, mapped(self.some, torch.clone), self.some_upstream)
        self.limits = {name: max(FACTOR * relative(plain[name], want), floor(case, want)) for name, want in self.truth.items()}

    def _truth(self, exact) -> dict[str, Tensor]:
        return values(self.case, exact, widened(mapped(self.some, torch.clone)), widened(self.some_upstream))

    def judge(self, variant: Variant, function) -> Verdict:
        """Runs ``function`` on all rows and compares; the worst quantity is the one that uses up most of its limit."""
        case = self.case
        if case.check is not None:
            return case.check(case, variant, function)
        truth, limits = self.truth, self.limits
        if variant.exact is not None:
            truth = self._truth(variant.exact)
            limits = {name: floor(case, want) for name, want in truth.items()}
        inputs, upstream = mapped(self.inputs, torch.clone), self.upstream
        if variant.adapt is not None:
            inputs, upstream = variant.adapt(case, inputs, upstream)
        found = values(case, function, inputs, upstream)
        if variant.restore is not None:
            found = {name: variant.restore(case, tensor) for name, tensor in found.items()}
        verdicts = []
        for name, want in truth.items():
            got = found.get(name)
            if got is None:
                return Verdict(float("nan"), limits[name], f"{name}, which is not there")
            if self.rows is not None and len(got) > len(want):
                if not bool(torch.isfinite(got).all()):
                    return Verdict(float("nan"), limits[name], f"{name}, which is not finite")
                got = got[self.rows]
            verdicts.append(Verdict(relative(got, want), limits[name], name))
        return max(verdicts, key=lambda v: v.error / v.limit if v.error == v.error else float("inf"))
