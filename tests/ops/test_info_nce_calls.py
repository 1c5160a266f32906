"""InfoNCE in blocks as a group computes it; what calls refuse, who serves them, and embeddings that are not finite."""

import re

import compare
import pytest
import torch
from attention_cases import DEVICE, EXACT, INTERPRETED, WHERE
from info_nce_cases import NAMES, backend, exact, inputs, with_gradients
from torch import Tensor

from fastidc import ops
from fastidc.ops import _dispatch
from fastidc_kernels import info_nce as kernels

pytestmark = WHERE
TOLERANCE = 1e-12 if DEVICE == "cpu" else 3e-5
ours = backend("triton")


def in_blocks(text: Tensor, pair: Tensor, scale: Tensor, sizes: list[int], in_place: bool) -> list[Tensor]:
    """Loss and three gradients from one block of texts after another against all pairs, put together as ranks would."""
    total, wide = len(text), EXACT
    flags = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    units = [kernels.info_nce_unit(text[at : at + n], pair, flags) for at, n in zip(offsets, sizes, strict=True)]
    done = [kernels.info_nce_fwd(*unit, scale, n, at) for unit, at, n in zip(units, offsets, sizes, strict=True)]
    combined = [kernels.info_nce_combine(row, column) for row, column, _ in done]
    columns = torch.cat([column for _, column in combined])  # [blocks, 2, M]
    if in_place:  # as two all-reduces would
        top = columns[:, 0].amax(0)
        columns = torch.stack([top, (columns[:, 1] * (columns[:, 0] - top).exp2()).sum(0)])[None]
    loss, dpair, dscale, dtext = 0, 0, 0, []
    for unit, (row, _), (*_, diagonal), at, n in zip(units, combined, done, offsets, sizes, strict=True):
        part, softmax, miss = kernels.info_nce_loss(row, columns, diagonal, at, total)
        grad = torch.full((), 3.0, dtype=wide, device=DEVICE)
        gradient, of_scale = kernels.info_nce_bwd(*unit, softmax, miss, scale, grad, at, total, text.shape[1], wide)
        loss, dpair, dscale = loss + part, dpair + gradient[n:], dscale + of_scale
        dtext.append(gradient[:n])
    return [loss, torch.cat(dtext), dpair, dscale]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sizes", [[35, 35], [1, 40, 29]], ids=str)
def test_blocks_make_the_whole(sizes, in_place):
    given = inputs(70, 40, dtype=EXACT)
    got = in_blocks(*given, sizes, in_place)
    for name, a, b in zip(NAMES, got, exact(given), strict=True):
        compare.assert_close(a, b, TOLERANCE, name)


def test_one_block_is_the_whole():
    given = inputs(70, 40, dtype=EXACT)
    whole, block = with_gradients(ours, given), in_blocks(*given, [70], False)
    for name, a, b in zip(NAMES, whole, block, strict=True):
        compare.assert_close(a, b, TOLERANCE, name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, p, s: (t[:5], p, s), "text and pair must both be [B, E], B and E at least 1, got [5, 24] and [7, 24]"),
        (lambda t, p, s: (t[:, :8], p, s), "got [7, 8] and [7, 24]"),
        (lambda t, p, s: (t[:0], p[:0], s), "B and E at least 1, got [0, 24]"),
        (lambda t, p, s: (t[0], p[0], s), "must both be [B, E]"),
        (lambda t, p, s: (t.half(), p, s), "one dtype, of fp16, bf16, fp32 and fp64, and one device, got torch.float16 on"),
        (lambda t, p, s: (t.int(), p.int(), s), "one dtype, of fp16, bf16, fp32 and fp64, and one device, got torch.int32 on"),
        (lambda t, p, s: (t, p.to("meta"), s), "on meta"),
        (lambda t, p, s: (t, p, 4.6), "logit_scale must be a tensor, got 4.6."),
        (lambda t, p, s: (t, p, s[None]), "logit_scale must be one floating-point number, shape [], on"),
        (lambda t, p, s: (t.repeat(1, 50), p.repeat(1, 50), s), "an embedding may have 1024 numbers at most, not 1200"),
    ],
)
def test_refusals_are_sentences(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ours(*change(*inputs(7, 24, dtype=torch.float32)))


@INTERPRETED
def test_the_interpreter_takes_no_bf16():
    with pytest.raises(ValueError, match="multiplies bf16 matrices wrongly"):
        ours(*inputs(7, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("compiled", [False, True])
def test_embeddings_that_are_not_finite(name, compiled):
    """Nothing waits for the device; whoever asks later learns which input and which row."""
    run = torch.compile(backend(name), fullgraph=True, backend="aot_eager") if compiled else backend(name)
    ops.raise_faults()
    text, pair, scale = inputs(9, 24, dtype=torch.float32)
    run(text, pair, scale)
    ops.raise_faults()
    text[4, 3], text[7, 0], pair[8, 23] = torch.inf, torch.nan, torch.nan
    run(text, pair, scale)
    with pytest.raises(ValueError, match=r"met a text embedding that is not finite, first in row 4 of its batch.*a pair embedding.*row 8"):
        ops.raise_faults()
    ops.raise_faults()  # once is enough


def test_dispatch():
    """Who serves where: asked without a device."""
    op = _dispatch.OPS["info_nce"]

    def spec(**facts):
        return _dispatch.Spec(**({"op": "info_nce", "device": "cuda", "dtype": torch.bfloat16, "grad": True, "arch": 90} | facts))

    assert op.order(spec())[0] == "triton"
    assert op.order(spec(dtype=torch.float32))[0] == "torch"
    assert op.resolve(spec(device="cpu", dtype=torch.float32), "auto") == "torch"
    assert op.resolve(spec(head_dim=2048), "auto") == "torch"
    assert "needs compute capability 8.0" in " ".join(op.explain(spec(arch=75))["triton"]) or DEVICE == "cpu"


@pytest.mark.gpu
def test_a_captured_graph_replays():
    text, pair, scale = (x.requires_grad_() for x in inputs(128, 512, dtype=torch.bfloat16))

    def run() -> tuple[Tensor, ...]:
        loss = ours(text, pair, scale)
        return loss.detach(), *torch.autograd.grad(loss, [text, pair, scale])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        text.mul_(1.5).add_(0.1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
