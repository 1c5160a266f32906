"""What the attention kernels read and write: what they are given, wherever it lies, and nothing else."""

import math

import compare
import pytest
import torch
from attention_cases import (
    CAPTIONS,
    DEVICE,
    EXACT,
    EXACT_TOLERANCE,
    FAMILIES,
    WHERE,
    noise,
    offsets,
    self_run,
    surrounded,
    with_gradients,
)

from fastidc import ops
from fastidc_kernels import attention as kernels
from fastidc_kernels._tiles import AttentionTile

pytestmark = WHERE


@pytest.mark.parametrize("family", ["self 49", "self 100", "causal 14", "packed causal", "cross 32x100", "cross 1x7"])
def test_reads_nothing_else_and_writes_nothing_else(family):
    """Inputs between NaN, results into NaN: strided views give the bits that contiguous tensors give, and the surroundings stay NaN."""
    run, shapes = FAMILIES[family]
    heads = 2
    dense = [noise(*shape, dtype=torch.float32, seed=i).detach() for i, shape in enumerate(shapes)]
    expected = with_gradients(run, dense)
    views = [surrounded(x)[0] for x in dense]
    q, k, v = views[0].chunk(3, -1) if len(views) == 1 else (views[0], *views[1].chunk(2, -1))
    packed = family.startswith("packed")
    options = {
        "causal": "causal" in family,
        "cu_seqlens": offsets() if packed else None,
        "longest": max(CAPTIONS) if packed else 0,
        "dropout_p": 0.0,
        "seed": None,
        "faults": torch.zeros(1, dtype=torch.int32, device=DEVICE) if packed else None,
    }
    out, around = surrounded(torch.full_like(expected[0], math.nan))
    kernels.attention_fwd(q, k, v, out, heads, **options)
    assert torch.equal(out, expected[0])
    assert int((~around.isnan()).sum()) == out.numel()
    grad = surrounded(noise(*out.shape, seed=9).detach().to(out.dtype))[0]
    written = [surrounded(torch.full_like(x, math.nan), margin=32) for x in dense]  # other strides than the inputs'
    parts = written[0][0].chunk(3, -1) if len(written) == 1 else (written[0][0], *written[1][0].chunk(2, -1))
    kernels.attention_bwd(q, k, v, grad, *parts, heads, **options)
    for (view, buffer), want in zip(written, expected[1:], strict=True):
        assert torch.equal(view, want)
        assert int((~buffer.isnan()).sum()) == view.numel()


def test_packed_sequences_do_not_see_each_other():
    """A sequence of NaN leaves its neighbours' bits alone, forward and backward; so do empty ones."""
    run, shapes = FAMILIES["packed causal"]
    x = noise(*shapes[0], dtype=torch.float32).detach()
    clean = with_gradients(run, [x])
    rows = torch.ones(len(x), dtype=torch.bool, device=DEVICE)
    rows[14:15] = rows[47:56] = False  # the third and the fifth sequence
    dirty = with_gradients(run, [torch.where(rows[:, None], x, math.nan)])
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(clean, dirty, strict=True))
    assert dirty[0][~rows].isnan().all()


LAYOUTS = {
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd offset": lambda x: torch.cat([x, x], dim=-1).flatten()[3 : 3 + x.numel()].view_as(x),
    "columns apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["self 33", "cross 32x100"])
def test_any_layout(family, layout):
    """Views in, values and gradients of their contiguous copies out."""
    run, shapes = FAMILIES[family]
    views = [LAYOUTS[layout](noise(*shape, dtype=EXACT, seed=i).detach()) for i, shape in enumerate(shapes)]

    def gradients(inputs):
        leaves = [x.requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, noise(*out.shape, seed=9).detach().to(out.dtype))]

    for got, want in zip(
        gradients(views), gradients([x.detach().clone(memory_format=torch.contiguous_format) for x in views]), strict=True
    ):
        compare.assert_close(got, want, EXACT_TOLERANCE)


@pytest.mark.parametrize("strides", [(25_000_000 * 100, 25_000_000), (3_000_000_000, 96)], ids=["rows", "sequences"])
def test_offsets_past_two_to_the_31(strides):
    """Rows that far apart are copied first, sequences are read where they are. The memory between them is never touched."""
    sequences, length = (1, 100) if strides[1] > 96 else (2, 9)
    last = (sequences - 1) * strides[0] + (length - 1) * strides[1] + 96
    far = torch.empty(last, dtype=torch.float16, device=DEVICE).as_strided((sequences, length, 96), (*strides, 1))
    far.copy_(noise(sequences, length, 96).detach())
    assert torch.equal(self_run(2)(far), self_run(2)(far.clone(memory_format=torch.contiguous_format)))


def test_offsets_and_seeds_that_are_views():
    qkv = noise(sum(CAPTIONS), 96, dtype=torch.float32).detach()
    wide = torch.stack([offsets(), torch.full_like(offsets(), 7)], dim=1)
    seeds = torch.arange(12, device=DEVICE).view(2, 6)

    def run(ends, seed):
        return ops.self_attention(qkv, 2, cu_seqlens=ends, max_seqlen=32, dropout_p=0.2, seed=seed, backend="triton")

    assert torch.equal(run(wide[:, 0], seeds[:, 3]), run(offsets(), seeds[:, 3].contiguous()))


@pytest.mark.parametrize("heads_a_program", [1, 2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_every_way_to_cut(heads_a_program, backward):
    """Blocks of queries and heads of a program change no result beyond rounding."""
    heads, length, width = 4, 50, 64
    qkv = noise(2, length, 3 * width, dtype=EXACT).detach()
    want = with_gradients(lambda x: ops.self_attention(x, heads, backend="reference"), [qkv])
    options = {"causal": False, "cu_seqlens": None, "longest": 0, "dropout_p": 0.0, "seed": None, "faults": None}
    for block in (16, 32, 64):
        tile = AttentionTile(block, 64 // block, 64, 4, heads=heads_a_program)
        if not backward:
            out = torch.full_like(qkv[..., :width], math.nan)
            kernels.attention_fwd(*qkv.chunk(3, -1), out, heads, **options, tile=tile)
            compare.assert_close(out, want[0], EXACT_TOLERANCE)
            continue
        d = torch.full_like(qkv, math.nan)
        upstream = noise(2, length, width, seed=9).detach().to(EXACT)
        kernels.attention_bwd(*qkv.chunk(3, -1), upstream, *d.chunk(3, -1), heads, **options, tile=tile)
        compare.assert_close(d, want[1], EXACT_TOLERANCE)
