"""What calls of linear cross entropy refuse, who serves them, autocast, targets that are no words, and what a captioning step holds in memory."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import torch
from attention_cases import DEVICE, EXACT, INTERPRETED, WHERE
from linear_cross_entropy_cases import NAMES, PAD, backend, exact, inputs, with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import SMALL

from fastidc import CLIP4IDC, ops
from fastidc.ops import _dispatch, _linear_cross_entropy_triton
from fastidc_kernels import _tiles
from fastidc_kernels import linear_cross_entropy as kernels

pytestmark = WHERE
ROOT = Path(__file__).parents[2]
module = importlib.import_module("fastidc.ops.linear_cross_entropy")  # in `fastidc.ops` the function has the name
ours = backend("triton")


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, b, t: (x[:, :8], w, b, t), "must be [N, D], [V, D], [V] and [N], got [7, 8], [33, 24], [33] and [7]"),
        (lambda x, w, b, t: (x, w, b[:5], t), "got [7, 24], [33, 24], [5] and [7]"),
        (lambda x, w, b, t: (x, w, b, t[:, None]), "got [7, 24], [33, 24], [33] and [7, 1]"),
        (lambda x, w, b, t: (x[:0], w, b, t[:0]), "N, V and D must be at least 1"),
        (lambda x, w, b, t: (x.half(), w, b, t), "one floating-point dtype, and bias that or fp32 where they are in half precision"),
        (lambda x, w, b, t: (x, w, b.half(), t), "got torch.float32, torch.float32 and torch.float16"),
        (lambda x, w, b, t: (x, w, b, t.float()), "targets must be integers, got torch.float32"),
        (lambda x, w, b, t: (x, w, b, t > 0), "targets must be integers, got torch.bool"),
        (lambda x, w, b, t: (x, w, b, t.to("meta")), "must be on one device"),
    ],
)
def test_refusals_are_sentences(change, sentence, name):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        backend(name)(*change(*inputs(7, 24, 33, dtype=torch.float32)))


def test_too_wide_a_row():
    with pytest.raises(ValueError, match="a row may have 1024 numbers at most, not 1200"):
        ours(*inputs(2, 1200, 5, dtype=torch.float32))


@INTERPRETED
def test_the_interpreter_takes_no_bf16():
    with pytest.raises(ValueError, match="multiplies bf16 matrices wrongly"):
        ours(*inputs(7, 24, 33, dtype=torch.bfloat16))


@pytest.mark.parametrize("wrong", [33, 10**6, -1, -(2**40)])
def test_targets_that_are_no_words(wrong):
    """Nothing waits for the device and nothing outside the table is read; whoever asks later learns the row, which was left out."""
    ops.raise_faults()
    given = inputs(40, 24, 33, dtype=EXACT, pads=0.2)
    ours(*given)
    ops.raise_faults()
    rows = torch.tensor([5, 17, 33], device=DEVICE)
    given[3][rows] = wrong
    got = with_gradients(ours, given)
    with pytest.raises(ValueError, match=r"a target that is neither the pad id nor a word of the vocabulary, first in row 5 of its batch"):
        ops.raise_faults()
    ops.raise_faults()  # once is enough
    given[3][rows] = PAD
    for part, a, b in zip(NAMES, got, exact(given), strict=True):
        compare.assert_close(a, b, 1e-12 if DEVICE == "cpu" else 3e-5, part)


@INTERPRETED
def test_torch_on_a_cpu_refuses_them_at_once():
    given = inputs(7, 24, 33, dtype=torch.float32)
    given[3][2] = 33
    with pytest.raises(ValueError, match=r"a target is 33, which is neither ignore_index 0 nor one of the 33 words\."):
        backend("torch")(*given)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_autocast(name):
    """Masters in fp32, products in half precision, gradients back in fp32: as `F.linear` under autocast."""
    half = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    given = inputs(33, 24, 65, dtype=torch.float32)
    rounded = [given[0].to(half), given[1].to(half), *given[2:]]
    with torch.autocast(DEVICE, dtype=half):
        got = with_gradients(backend(name), given)
    for part, a, b in zip(NAMES, got, with_gradients(backend(name), rounded), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float()), part


def test_dispatch():
    """Who serves where: asked without a device."""
    op = _dispatch.OPS["linear_cross_entropy"]

    def spec(**facts):
        return _dispatch.Spec(
            **({"op": op.name, "device": "cuda", "dtype": torch.bfloat16, "grad": True, "arch": 90, "head_dim": 512} | facts)
        )

    assert op.order(spec())[0] == "triton"
    assert op.order(spec(dtype=torch.float32))[0] == "torch"
    assert op.resolve(spec(device="cpu", dtype=torch.float32), "auto") == "torch"
    assert op.resolve(spec(head_dim=2048), "auto") == "torch"
    assert "in fp32 a row may have 256 numbers at most, not 512" in " ".join(op.explain(spec(dtype=torch.float32))["triton"])
    assert "needs compute capability 8.0" in " ".join(op.explain(spec(arch=75))["triton"]) or DEVICE == "cpu"


# ---- how the work is cut


@pytest.mark.parametrize("rows", [1, 224, 512, 1792, 14336, 57344, 10**6])
def test_the_vocabulary_is_cut_so_that_no_multiprocessor_idles(rows):
    """Whatever is not the last round is full, and few rows come in many parts."""
    tile = _tiles.linear_cross_entropy("fwd", 512, 2, 90)
    programs = -(-rows // tile.rows) * _tiles.linear_cross_entropy_pieces(512)[0]
    steps = _tiles.linear_cross_entropy_steps(programs, 49408, tile, 132)
    parts = -(-49408 // (steps * tile.words))
    assert 1 <= parts <= 32
    assert parts == 32 or programs * parts >= 2 * 132 or parts * tile.words * (steps - 1) < 49408
    rounds = -(-programs * parts // 132)
    assert parts >= 31 or programs * parts / 132 > 0.85 * rounds, (parts, rounds)


@INTERPRETED
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("words", [16, 64])
def test_every_way_to_cut(rows, words):
    given = inputs(33, 24, 101)
    *real, targets = given
    tile, faults = _tiles.LinearCrossEntropyTile(rows, words, 4, 1, 16), torch.zeros(1, dtype=torch.int32)
    packed, order, kept, count = kernels.linear_cross_entropy_pack(real[0], targets, 101, PAD, faults)
    parts = kernels.linear_cross_entropy_fwd(packed, *real[1:], count, True, tile)
    loss, lse, dx = kernels.linear_cross_entropy_loss(*parts, packed, *real[1:], order, kept, count)
    grad = torch.tensor(3.0, dtype=torch.float64)
    both = kernels.linear_cross_entropy_bwd(grad, packed, *real[1:], lse, kept, count, True, True, tile)
    _, alone = kernels.linear_cross_entropy_bwd(grad, packed, *real[1:], lse, kept, count, False, True, tile)
    want = exact(given)
    for part, a, b in zip(NAMES, [loss, kernels.linear_cross_entropy_scale(dx, grad, count), *both], want, strict=True):
        compare.assert_close(a, b, 1e-12, part)
    compare.assert_close(alone, want[3], 1e-12)


@pytest.mark.slow  # the gate of all kernels compiles them in `make test`
@INTERPRETED
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_machine_code(arch, tmp_path):
    """Without a GPU: no spills, shared memory that a program may have, tensor cores and wide loads in every kernel at the paper's width."""
    code = "import sys; from bench import aot; from bench.kernels import COMPILATIONS as all; "
    code += "sys.exit(aot.main(sys.argv[1:], [one for one in all if one.name.startswith('linear_cross_entropy')]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code, "--arch", arch], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    products = [
        line
        for line in done.stdout.splitlines()
        if line.partition(" ")[0].endswith(("_fwd", "_loss", "_bwd", "_bwd_bias")) and " rows x " in line
    ]
    assert len(products) == 5
    assert all(f"mma {'wgmma' if arch == 'sm_90' else 'mma.sync'}," in line for line in products), products


# ---- memory


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns, those inside our own ops too."""

    ours = (
        module.linear_cross_entropy_chunked,
        _linear_cross_entropy_triton.linear_cross_entropy_fwd,
        _linear_cross_entropy_triton.linear_cross_entropy_bwd,
    )

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = next((op._init_fn for op in self.ours if func is op._opoverload), None)
        if inside is None:
            found = func(*args, **(kwargs or {}))
        else:
            with self:
                found = inside(*args)
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.itemsize)
        return found


@INTERPRETED
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("name", "held"), [("triton", False), ("torch", False), ("reference", True)])
def test_a_captioning_step_holds_no_logits(name, held, frozen, monkeypatch):
    """No tensor of a step on a CPU is as large as logits [N, V] in fp32 of the rows that have a target; the specification's is, so the test can fail."""
    monkeypatch.setenv("FASTIDC_BACKEND", f"linear_cross_entropy={name}")
    monkeypatch.setattr(module, "CHUNK", 16 * 997 * 4)
    torch.manual_seed(0)
    model = CLIP4IDC(dataclasses.replace(SMALL, vocab_size=997))
    model.text_encoder.token_embedding.requires_grad_(not frozen)
    images = torch.randint(0, 256, (2, 6, 3, 48, 48), dtype=torch.uint8)
    ids = torch.randint(1, 995, (6, 24))
    ids[:, 18:] = PAD
    with _Largest() as seen:
        model.caption_loss(*images, ids, ids).backward()
    assert model._captioner.head_bias.grad.any()
    assert (seen.bytes >= 4 * 6 * 18 * 997) == held, seen.bytes


@INTERPRETED
def test_chunks_as_they_are_shipped():
    """At CLIP's vocabulary: no tensor of more numbers than a chunk, of which 600 rows need two."""
    x, weight, bias = torch.randn(600, 8, requires_grad=True), torch.randn(49408, 8), torch.zeros(49408, requires_grad=True)
    with _Largest() as seen:
        ops.linear_cross_entropy(x, weight, bias, torch.ones(600, dtype=torch.long), backend="torch").backward()
    assert seen.bytes <= module.CHUNK < 4 * 600 * 49408


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_no_gradient_of_a_gradient_rather_than_a_wrong_one(name):
    x, w, b, t = inputs(5, 24, 33)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, w, b, t, backend=name)
    (gradient,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backward through fastidc"):
        gradient.square().sum().backward()


@pytest.mark.gpu
def test_a_captured_graph_replays():
    *real, targets = inputs(512, 512, 4999, dtype=torch.bfloat16)
    real = [x.requires_grad_() for x in real]

    def run() -> tuple[Tensor, ...]:
        loss = ours(*real, targets)
        return loss.detach(), *torch.autograd.grad(loss, real)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        real[0].mul_(1.5).add_(0.1)
        targets[::2] = PAD  # fewer rows than at capture, and the next time more
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
    targets.fill_(7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
