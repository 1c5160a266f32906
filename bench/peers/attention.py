"""Attention as its users run it: SDPA by kernel, FlexAttention compiled, varlen where torch has it, xformers, FlashAttention's wheels.

Every callable takes packed projections and returns [B, L, H*D], as `fastidc.ops.self_attention` does; heads are views where the peer takes
views. Packed captions go to the peers that know them; the others get the same captions padded, which is not timed.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import exact
from bench.case import Case, Inputs, MissingError, Variant

KERNELS = {"sdpa": None, "sdpa flash": "FLASH_ATTENTION", "sdpa efficient": "EFFICIENT_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}
FLEX_PAIRS = (128, 1024)
HALF = (torch.float16, torch.bfloat16)


def variants(case: Case) -> list[Variant]:
    layout = {"adapt": pad, "restore": unpad} if case.shape["ragged"] else {}
    named = {**KERNELS, "sdpa math": "MATH"}
    rows = [Variant(name, lambda case, k=kernel: sdpa(k), _only_cuda(kernel), **layout) for name, kernel in named.items()]
    return [
        *rows,
        Variant("varlen_attn", _varlen, lambda case: _half(case) + _packed_only(case) + _no_dropout(case)),
        Variant("flex_attention", _flex, lambda case: _no_dropout(case) + _power_of_two(case) + _few_sizes(case), compiled=True),
        Variant("xformers", _xformers, _cuda, needs=("xformers",)),
        Variant("flash-attn 2", _flash2, _half, needs=("flash_attn",)),
        Variant("flash-attn 3", _flash3, lambda case: _half(case) + _no_dropout(case), needs=("flash_attn_interface",)),
    ]


# ---- what a peer refuses


def _cuda(case: Case) -> list[str]:
    return [] if case.device == "cuda" else ["it runs on CUDA only."]


def _half(case: Case) -> list[str]:
    return _cuda(case) + ([] if case.dtype in HALF else ["it takes fp16 and bf16 only."])


def _no_dropout(case: Case) -> list[str]:
    return ["it has no dropout."] if case.shape["dropout"] else []


def _packed_only(case: Case) -> list[str]:
    return [] if case.shape["ragged"] else ["it is for sequences of unequal length."]


def _power_of_two(case: Case) -> list[str]:
    size = case.shape["head_dim"]
    return [] if size & (size - 1) == 0 else ["its head size must be a power of two."]


def _few_sizes(case: Case) -> list[str]:
    return (
        []
        if case.shape["pairs"] in FLEX_PAIRS
        else [f"it is compiled anew for every size, so only for {FLEX_PAIRS[0]} and {FLEX_PAIRS[1]} pairs."]
    )


def _only_cuda(kernel: str | None) -> Callable[[Case], list[str]]:
    def unsupported(case: Case) -> list[str]:
        if kernel in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            return _cuda(case)
        return _half(case) if kernel == "FLASH_ATTENTION" and case.device == "cuda" else []

    return unsupported


# ---- layouts


def pad(case: Case, inputs: Inputs, upstream: list[Tensor]) -> tuple[Inputs, list[Tensor]]:
    lengths, longest = inputs["lengths"], inputs["longest"]
    filled = {"qkv": exact.padded(inputs["qkv"], lengths, longest), "num_heads": inputs["num_heads"], "causal": True, "dropout_p": 0.0}
    return filled, [exact.padded(up, lengths, longest) for up in upstream]


def unpad(case: Case, tensor: Tensor) -> Tensor:
    return exact.packed(tensor, case.shape["lengths"])


def _parts(qkv: Tensor | None, q: Tensor | None, kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.chunk(3, -1) if qkv is not None else (q, *kv.chunk(2, -1))


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[..., H*D] -> [..., H, D], a view."""
    return x.unflatten(-1, (num_heads, -1))


# ---- peers


def sdpa(kernel: str | None) -> Callable[..., Tensor]:
    """F.scaled_dot_product_attention, by torch's own choice (None) or with one kernel of `torch.nn.attention.SDPBackend`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(qkv=None, q=None, kv=None, *, num_heads: int, causal: bool, dropout_p: float) -> Tensor:
        with nullcontext() if kernel is None else sdpa_kernel(getattr(SDPBackend, kernel)):
            parts = (_split(x, num_heads).transpose(1, 2) for x in _parts(qkv, q, kv))
            out = F.scaled_dot_product_attention(*parts, is_causal=causal, dropout_p=dropout_p)
        return out.transpose(1, 2).flatten(2)

    return run


def _varlen(case: Case) -> Callable[..., Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise MissingError(f"torch {torch.__version__} has no varlen_attn.") from None
    # torch 2.10 says is_causal, later versions say it by the window
    older = "is_causal" in inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if older else {"window_size": (-1, 0)}

    def run(qkv, cu_seqlens, lengths, longest, num_heads) -> Tensor:
        q, k, v = (_split(x, num_heads) for x in qkv.chunk(3, -1))
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal).flatten(1)

    return run


def _flex(case: Case) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    facts = case.shape
    attend = torch.compile(flex_attention, dynamic=False)
    mask = None
    if facts["ragged"]:
        total = sum(facts["lengths"])
        sizes = torch.tensor(facts["lengths"], device=case.device)
        document = torch.repeat_interleave(torch.arange(len(sizes), device=case.device), sizes)

        def same_document(b, h, i, j):
            return (document[i] == document[j]) & (i >= j)

        # compiled, because uncompiled it would hold total x total booleans
        mask = create_block_mask(same_document, None, None, total, total, device=case.device, _compile=True)
    elif facts["causal"]:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, facts["length"], facts["length"], device=case.device)

    def run(qkv=None, q=None, kv=None, *, num_heads, causal=False, dropout_p=0.0) -> Tensor:
        out = attend(*(_split(x, num_heads).transpose(1, 2) for x in _parts(qkv, q, kv)), block_mask=mask)
        return out.transpose(1, 2).flatten(2)

    def ragged(qkv, cu_seqlens, lengths, longest, num_heads) -> Tensor:
        return run(qkv[None], num_heads=num_heads)[0]

    return ragged if facts["ragged"] else run


def _xformers(case: Case) -> Callable[..., Tensor]:
    from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention

    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(case.shape["lengths"]) if case.shape["ragged"] else None

    def run(qkv=None, q=None, kv=None, *, num_heads, causal, dropout_p) -> Tensor:
        parts = (_split(x, num_heads) for x in _parts(qkv, q, kv))
        return memory_efficient_attention(*parts, attn_bias=LowerTriangularMask() if causal else None, p=dropout_p).flatten(2)

    def ragged(qkv, cu_seqlens, lengths, longest, num_heads) -> Tensor:
        return memory_efficient_attention(*(_split(x, num_heads)[None] for x in qkv.chunk(3, -1)), attn_bias=bias)[0].flatten(1)

    return ragged if case.shape["ragged"] else run


def _flash2(case: Case) -> Callable[..., Tensor]:
    import flash_attn as package

    def run(qkv=None, q=None, kv=None, *, num_heads, causal, dropout_p) -> Tensor:
        if qkv is not None:
            return package.flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, num_heads, -1)), dropout_p, causal=causal).flatten(2)
        both = kv.unflatten(-1, (2, num_heads, -1))
        return package.flash_attn_kvpacked_func(_split(q, num_heads), both, dropout_p, causal=causal).flatten(2)

    def ragged(qkv, cu_seqlens, lengths, longest, num_heads) -> Tensor:
        packed = qkv.unflatten(-1, (3, num_heads, -1))
        return package.flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, causal=True).flatten(1)

    return ragged if case.shape["ragged"] else run


def _flash3(case: Case) -> Callable[..., Tensor]:
    import flash_attn_interface as package

    def first(out) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def run(qkv=None, q=None, kv=None, *, num_heads, causal, dropout_p) -> Tensor:
        return first(package.flash_attn_func(*(_split(x, num_heads) for x in _parts(qkv, q, kv)), causal=causal)).flatten(2)

    def ragged(qkv, cu_seqlens, lengths, longest, num_heads) -> Tensor:
        parts = (_split(x, num_heads) for x in qkv.chunk(3, -1))
        return first(package.flash_attn_varlen_func(*parts, cu_seqlens, cu_seqlens, longest, longest, causal=True)).flatten(1)

    return ragged if case.shape["ragged"] else run
