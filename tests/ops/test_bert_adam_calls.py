"""What the optimiser's step refuses and who serves it; waiting for nothing and captured steps, on a GPU."""

import re

import pytest
import torch
from attention_cases import DEVICE, INTERPRETED, WHERE
from bert_adam_cases import SIZES, Optimiser, assert_same, gradients
from torch import Tensor

from fastidc.ops import _bert_adam_triton, _dispatch
from fastidc_kernels import _tiles

pytestmark = WHERE


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a tensor and several blocks a chunk, some whole and some not, of few elements."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_tiles, "bert_adam", lambda arch: _tiles.BertAdamTile(2048, 1024, 2048, 4))


def with_param(o: Optimiser, i: int, p: Tensor) -> None:
    o.params[i] = p


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda o, g: o.params.pop(), "as many gradients and moments as parameters are needed, got 2 parameters, 3 gradients"),
        (lambda o, g: g.__setitem__(3, g[3].double()), "takes gradients in fp32, fp16 and bf16, not in torch.float64"),
        (lambda o, g: g.__setitem__(3, g[3][:5]), "with their parameters' shapes on"),
        (lambda o, g: g.__setitem__(slice(None), [x.double() for x in g]), "gradients in fp32, fp16 and bf16, not in torch.float64"),
        (lambda o, g: with_param(o, 2, o.params[2].half()), "it takes parameters in fp32, not in torch.float16"),
        (lambda o, g: o.first.__setitem__(2, o.first[2].half()), "takes parameters and moments in fp32, got torch.float16"),
        (lambda o, g: with_param(o, 4, o.params[4].t().contiguous().t()), "takes dense tensors of one shape on"),
        (lambda o, g: o.second.__setitem__(2, o.second[2][:3]), "got [1000] and [3] with strides [1]"),
        (
            lambda o, g: o.shadows.__setitem__(2, o.shadows[2].float()),
            "shadows are all in bf16 or all in fp16, got torch.float16, torch.float32",
        ),
    ],
)
def test_refusals_are_sentences(change, sentence):
    optimiser, grads = Optimiser(shadow=torch.float16), gradients(0)
    change(optimiser, grads)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        optimiser(grads)


def test_rates_that_do_not_fit():
    optimiser = Optimiser()
    with pytest.raises(ValueError, match="2 groups and 1 rates"):
        optimiser(gradients(0), [1.0])
    with pytest.raises(ValueError, match=re.escape("lrs must be fp32 [2], a rate a group, got torch.float64 [2]")):
        optimiser(gradients(0), torch.zeros(2, device=DEVICE, dtype=torch.float64))


def test_rates_of_half_precision_are_numbers():
    """fp16 of 1e-7 is 1.19e-7."""
    optimiser = Optimiser("torch")
    for part in (optimiser.params, optimiser.first, optimiser.second):
        part[:] = [x.half() for x in part]
    grads = [g.half() for g in gradients(0)]
    with pytest.raises(ValueError, match="take their rates as numbers"):
        optimiser(grads, torch.zeros(2, device=DEVICE))
    optimiser(grads, [1e-7, 1e-7])


def test_who_serves():
    op = _dispatch.OPS["bert_adam"]

    def order(device: str, dtype: torch.dtype) -> tuple[str, ...]:
        return op.order(_dispatch.Spec("bert_adam", device, dtype, False, 90))

    assert order("cuda", torch.float32) == ("triton", "torch")
    assert order("cuda", torch.float16) == order("cpu", torch.float32) == ("torch",)
    # a run in bf16 trains fp32 parameters, and asks for its backends with bf16
    assert not _bert_adam_triton.unsupported(_dispatch.Spec("bert_adam", DEVICE, torch.bfloat16, True, 90))
    assert (
        "8.0 or newer" in " ".join(_bert_adam_triton.refusals(_dispatch.Spec("bert_adam", "cuda", torch.float32, True, 75)))
        or DEVICE == "cpu"
    )


@INTERPRETED
def test_a_cpu_is_torch_s_unless_asked(monkeypatch):
    monkeypatch.setattr(_bert_adam_triton.Tables, "step", lambda *a: pytest.fail("the interpreter served without being asked"))
    optimiser = Optimiser("auto")
    optimiser(gradients(0))


# ---- what only a GPU can answer


@pytest.mark.gpu
def test_waits_for_nothing():
    optimiser = Optimiser(shadow=torch.bfloat16)
    grads = [gradients(step) for step in range(4)]
    optimiser(grads[0], clip_norm=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            optimiser(grads[step], clip_norm=1.0, ceiling=(optimiser.params[0], 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_step_reads_new_rates():
    """Gradients at fixed addresses and at those of the capture, and eager steps with others between the replays."""
    ours, theirs = Optimiser(), Optimiser("reference")
    rates, static = torch.zeros(2, device=DEVICE), [torch.zeros(shape, device=DEVICE) for shape in SIZES]
    ours(gradients(0), rates, clip_norm=1.0)
    theirs(gradients(0), [0.0, 0.0], clip_norm=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = ours(static, rates, clip_norm=1.0)
    for step in range(1, 9):
        lrs = [1e-2 * step, 3e-3 * step]
        rates.copy_(torch.tensor(lrs))
        if step % 3 == 0:
            ours(gradients(step), rates, clip_norm=1.0)
        else:
            for own, g in zip(static, gradients(step), strict=True):
                own.copy_(g)
            graph.replay()
        want = theirs(gradients(step), lrs, clip_norm=1.0)
        if step % 3:
            assert float(norm) == pytest.approx(float(want), rel=1e-6)
    assert_same(ours.state, theirs.state)


@pytest.mark.gpu
def test_a_capture_needs_a_step_before():
    optimiser, rates, grads = Optimiser(), torch.zeros(2, device=DEVICE), gradients(0)
    with pytest.raises(ValueError, match="make one step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimiser(grads, rates)
