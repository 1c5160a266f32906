"""Self and cross attention at the lengths of CLIP4IDC, forward and backward, from packed projections to packed projections."""

import torch
from torch import Tensor

from bench import exact, roofline
from bench.case import Case, Inputs, Variant
from bench.cases import CAPTION, AttentionShape, Scale, of, sized
from bench.ours import variants_of
from bench.peers import attention as peers
from fastidc.reference import attention as reference

ABOUT = "attention over short sequences; % of floor is % of the copy bandwidth up to L = 100"
BASELINES = ("sdpa",)


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    """One size of every shape before the next size of any: a run that is cut short has something to say about all of them."""
    found = [(rank, shape, pairs) for shape in of("attention", scale) for rank, pairs in enumerate(sized(shape.sizes, scale))]
    return [_case(shape, pairs, device, dtype) for _, shape, pairs in sorted(found, key=lambda entry: entry[0])]


def caption_lengths(sequences: int, longest: int, seed: int = 0) -> list[int]:
    """As many lengths, drawn evenly from `CAPTION`; the first is the longest allowed."""
    draw = torch.Generator().manual_seed(seed)
    low, high = (min(limit, longest) for limit in CAPTION)
    return torch.randint(low, high + 1, (sequences,), generator=draw).tolist()


def _case(shape: AttentionShape, pairs: int, device: str, dtype: torch.dtype) -> Case:
    sequences, width, size = pairs * shape.sequences, shape.heads * shape.head_dim, dtype.itemsize
    facts = {"pairs": pairs, "sequences": sequences, "length": shape.length, "heads": shape.heads}
    facts |= {"head_dim": shape.head_dim, "causal": shape.causal, "dropout": shape.dropout, "keys": shape.keys, "ragged": shape.ragged}
    common = {"family": "attention", "device": device, "dtype": dtype, "items": ("pairs", pairs)}
    if shape.ragged:
        lengths = caption_lengths(sequences, shape.length)
        floors = [roofline.attention(lengths.count(n), n, shape.heads, shape.head_dim, causal=True, size=size) for n in set(lengths)]
        joined = roofline.join(floors)  # one kernel serves all lengths
        floor = roofline.Floor((sum(joined.forward, roofline.Work()),), (sum(joined.backward, roofline.Work()),))
        fixed = {"lengths": lengths, "longest": shape.length, "num_heads": shape.heads}
        facts["lengths"] = lengths
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

        def ragged_inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
            return {"qkv": _noise((sum(lengths), 3 * width), device, dtype, seed), "cu_seqlens": ends, **fixed}

        name = f"{shape.name} mean L={sum(lengths) / sequences:.1f} H={shape.heads} n={pairs}"
        calls = {"exact": ragged_truth, "plain": ragged_truth}
        outputs = ((sum(lengths), width),)
        return Case(name=name, shape=facts, make_inputs=ragged_inputs, gradients=("qkv",), outputs=outputs, floor=floor, **calls, **common)

    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        options = {"num_heads": shape.heads, "causal": shape.causal, "dropout_p": shape.dropout}
        if shape.keys is None:
            return {"qkv": _noise((sequences, shape.length, 3 * width), device, dtype, seed), **options}
        q = _noise((sequences, shape.length, width), device, dtype, seed)
        return {"q": q, "kv": _noise((sequences, shape.keys, 2 * width), device, dtype, seed + 1), **options}

    length = f"L={shape.length}" if shape.keys is None else f"L={shape.length}x{shape.keys}"
    flags = (" causal" if shape.causal else "") + (f" dropout {shape.dropout}" if shape.dropout else "")
    floor = roofline.attention(sequences, shape.length, shape.heads, shape.head_dim, keys=shape.keys, causal=shape.causal, size=size)
    wants = ("qkv",) if shape.keys is None else ("q", "kv")
    return Case(
        name=f"{shape.name} {length} H={shape.heads}{flags} n={pairs}",
        shape=facts,
        make_inputs=inputs,
        exact=truth,
        plain=truth,  # products and a softmax in the case's own dtype, as flash-attention's tests have it
        outputs=((sequences, shape.length, width),),
        gradients=wants,
        floor=floor,
        per_row=wants,
        gate_inputs={"dropout_p": 0.0},  # a mask cannot be compared; the same callable runs without it
        **common,
    )


def _noise(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device=device).manual_seed(seed), device=device, dtype=dtype)


def truth(qkv=None, q=None, kv=None, *, num_heads: int, causal: bool, dropout_p: float) -> Tensor:
    return reference.cross_attention(q, kv, num_heads) if qkv is None else reference.self_attention(qkv, num_heads, causal)


def ragged_truth(qkv: Tensor, cu_seqlens: Tensor, lengths: list[int], longest: int, num_heads: int) -> Tensor:
    return exact.ragged_attention(qkv, lengths, longest, num_heads)


def variants(case: Case) -> list[Variant]:
    return [*variants_of("attention", _ours, _spec), *peers.variants(case)]


def _spec(case: Case) -> dict:
    facts = case.shape
    lengths = {"query_length": facts["length"], "key_length": facts["keys"] or facts["length"], "head_dim": facts["head_dim"]}
    return lengths | {"causal": facts["causal"], "dropout": facts["dropout"] > 0, "packed": facts["ragged"]}


def _ours(case: Case, backend: str):
    from fastidc import ops

    def ragged(qkv, cu_seqlens, lengths, longest, num_heads):
        return ops.self_attention(qkv, num_heads, causal=True, cu_seqlens=cu_seqlens, max_seqlen=longest, backend=backend)

    def run(qkv=None, q=None, kv=None, *, num_heads, causal, dropout_p):
        if qkv is None:
            return ops.cross_attention(q, kv, num_heads, dropout_p=dropout_p, backend=backend)
        return ops.self_attention(qkv, num_heads, causal=causal, dropout_p=dropout_p, backend=backend)

    return ragged if case.shape["ragged"] else run
