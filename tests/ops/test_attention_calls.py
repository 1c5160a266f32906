"""Which calls of attention are refused, in which words, and who serves the others."""

import math
import re

import pytest
import torch
from attention_cases import DEVICE, WHERE, noise, offsets, surrounded

from fastidc import ops
from fastidc.ops import _attention_triton, _dispatch
from fastidc_kernels import attention as kernels

pytestmark = WHERE


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: ops.self_attention(x, 5), "qkv has 96 numbers a row, which 5 heads cannot share out evenly in 3 equal parts"),
        (lambda x: ops.self_attention(x.repeat(1, 20, 1), 1, backend="triton"), "one tile holds 1 to 128 tokens, and here are more"),
        (lambda x: ops.self_attention(x, 4, backend="triton"), "a head must have 16, 32, 64 or 128 numbers."),
        (lambda x: ops.self_attention(x.repeat(1, 1, 4), 1, backend="triton"), "in fp32 a head may have 64 numbers at most, not 128"),
        (lambda x: ops.self_attention(x.int(), 1, backend="triton"), "it takes fp32, fp16 and bf16, not torch.int32"),
        (lambda x: ops.self_attention(x, 1, dropout_p=1.0), "dropout_p must be at least 0 and less than 1, got 1.0"),
        (lambda x: ops.self_attention(x, 1, dropout_p=0.5, seed=torch.zeros(2)), "seed must be int64 [2] on"),
        (lambda x: ops.self_attention(x, 1, max_seqlen=3), "max_seqlen belongs to packed sequences"),
        (lambda x: ops.self_attention(x[0], 1), "sequences end to end need cu_seqlens"),
        (lambda x: ops.self_attention(x, 1, cu_seqlens=offsets((7,)), max_seqlen=7), "with cu_seqlens, qkv must be [T, 3*H*D]"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets((7,))), "cu_seqlens needs max_seqlen"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets((7,)).long(), max_seqlen=7), "cu_seqlens must be int32 [S+1]"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets((7,)).to("meta"), max_seqlen=7), "cu_seqlens is on meta and qkv on"),
        (lambda x: ops.self_attention(x[0], 1, cu_seqlens=offsets(()), max_seqlen=7), "cu_seqlens names no sequence, and qkv has 7 rows"),
        (lambda x: ops.self_attention(x[0, 0, 0], 1), "qkv must have two or three dimensions, got []"),
        (lambda x: ops.cross_attention(x, x, 1), "q must be [B, Lq, H*D] and kv [B, Lk, 2*H*D]"),
        (lambda x: ops.cross_attention(x[..., :48].half(), x, 1), "q and kv must have one dtype and device"),
    ],
)
def test_refusals_are_sentences(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(noise(1, 7, 96, dtype=torch.float32).detach())


WRONG = {
    "must start at 0, got 1": [1, 4, 7],
    "must ascend, got 5 before 4 at index 2": [0, 5, 4, 7],
    "must end at the number of rows, 7, got 6": [0, 3, 6],
    "sequence 1 has 6 rows, more than max_seqlen 5": [0, 1, 7],
    "must end at the number of rows, 7, got 9": [0, 3, 5, 9],
    "must start at 0, got -2": [-2, 3, 7],
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_offsets(sentence):
    """On a CPU a sentence at once; on a GPU, where the host does not look, a flag for it to find, and nothing outside is touched."""
    wrong = torch.tensor(WRONG[sentence], dtype=torch.int32, device=DEVICE)
    qkv = noise(7, 96, dtype=torch.float32).detach()
    ops.raise_faults()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=sentence):
            ops.self_attention(qkv, 1, cu_seqlens=wrong, max_seqlen=5, backend="triton")
    options = {"causal": True, "cu_seqlens": wrong, "longest": 5, "dropout_p": 0.0, "seed": None}
    view, _ = surrounded(qkv)
    out, around = surrounded(torch.full((7, 32), math.nan, device=DEVICE))
    faults = _attention_triton.faults.on(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    kernels.attention_fwd(*view.chunk(3, -1), out, 1, faults=faults, **options)
    assert int((~around.isnan()).sum()) == int((~out.isnan()).sum())
    with pytest.raises(ValueError, match="Packed attention met cu_seqlens that do not ascend"):
        ops.raise_faults()
    ops.raise_faults()  # once is enough


def test_dispatch_of_triton():
    """Who serves where: asked without a device."""
    attention = _dispatch.OPS["attention"]

    def spec(**facts):
        base = {"op": "attention", "device": "cuda", "dtype": torch.bfloat16, "grad": True, "arch": 90}
        return _dispatch.Spec(**(base | {"head_dim": 64, "query_length": 50, "key_length": 50} | facts))

    assert attention.order(spec())[0] == "triton"
    assert attention.order(spec(dtype=torch.float32))[0] == "sdpa"
    assert attention.resolve(spec(query_length=197, key_length=197), "auto") == "sdpa"
    refusals = {name: " ".join(sentences) for name, sentences in attention.explain(spec(arch=75)).items()}
    assert "needs compute capability 8.0 or newer, and this device has 7.5" in refusals["triton"] or DEVICE == "cpu"
    assert attention.resolve(spec(device="cpu", dtype=torch.float32), "auto") == "sdpa"
