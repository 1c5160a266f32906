"""Every Triton kernel that the ahead-of-time gate compiles, at which shapes, and what its machine code has to contain.

Whoever writes a kernel adds its entries: the paper's shapes first, then every tile of its table under ``paper=False``.
"""

import itertools
from collections.abc import Iterator

from bench import kernels_rows
from bench.compilation import SIZES, Compilation
from fastidc_kernels import _tiles
from fastidc_kernels._tiles import AttentionTile, BertAdamTile, InfoNCETile, LinearCrossEntropyTile


def attention(
    tile: AttentionTile,
    name: str,
    *,
    backward: bool,
    dtype: str = "bf16",
    head_dim: int = 64,
    heads: int = 12,
    causal: bool = False,
    packed: bool = False,
    dropout: float = 0.0,
    paper: bool = True,
    arch: str | None = None,
) -> Compilation:
    """The attention kernel with ``tile``, as its launcher would call it."""
    tensors = ("q_ptr", "k_ptr", "v_ptr", *(("grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr") if backward else ("out_ptr",)))
    written = ("grad", "dq", "dkv") if backward else ("out",)
    strides = tuple(f"{of}_{step}" for of in ("q", "kv", *written) for step in ("batch", "row"))
    absent = {} if packed else {"cu_seqlens": None, "faults": None}
    absent |= {} if dropout else {"seed": None}
    signature = {name: f"*{dtype}" for name in tensors}
    signature |= {"cu_seqlens": "*i32", "seed": "*i64", "faults": "*i32"}
    signature |= dict.fromkeys(("sequences", "query_length", "key_length", "total_rows"), "i32")
    signature |= {"threshold": "i64"} | dict.fromkeys(strides, "i32")
    constants = {"GROUPS": heads // tile.heads, "HEADS": tile.heads, "HEAD_DIM": head_dim, "BLOCK_Q": tile.block_q, "BLOCKS": tile.blocks}
    constants |= {"BLOCK_K": tile.block_k, "CAUSAL": causal, "PACKED": packed, "KEEP": 1.0 - dropout, "FP64": False}
    flags = (" causal" if causal else "") + (" packed" if packed else "") + (f" dropout {dropout}" if dropout else "")
    shape = f"{tile.blocks}x{tile.block_q} queries, {tile.block_k} keys, {tile.heads} heads, {tile.warps} warps"
    return Compilation(
        name=f"attention_{'bwd' if backward else 'fwd'}",
        kernel=f"fastidc_kernels.attention:attention_{'bwd' if backward else 'fwd'}_kernel",
        config=f"{name} D={head_dim} {dtype}{flags} ({shape})",
        signature={**signature, **dict.fromkeys((*absent, *constants), "constexpr")},
        constants={**absent, **constants},
        divisible=(*tensors, *strides),
        warps=tile.warps,
        stages=tile.stages,
        declares="mma" if SIZES[dtype] == 2 else "wide_loads",
        paper=paper,
        arch=arch,
    )


# name -> queries, keys, heads and how the model calls it
_PAPER = {
    "intra L=50": (50, 50, 12, {}),
    "inter L=100": (100, 100, 12, {}),
    "packed captions L<=32": (32, 32, 8, {"causal": True, "packed": True}),
    "captions L=32": (32, 32, 8, {"causal": True, "dropout": 0.1}),
    "caption encoder L=100": (100, 100, 8, {"dropout": 0.1}),
    "caption cross 32x100": (32, 100, 8, {"dropout": 0.1}),
}


def _attentions() -> Iterator[Compilation]:
    """Both passes: the paper's shapes in bf16, then every tile of the table, with every way to call it."""
    for arch, backward in itertools.product(("sm_90", "sm_80"), (False, True)):
        chip = int(arch.removeprefix("sm_"))
        for name, (queries, keys, heads, use) in _PAPER.items():
            tile = _tiles.attention(queries, keys, 64, 2, "dropout" in use, backward, chip)
            yield attention(tile, name, backward=backward, heads=heads, arch=arch, **use)
        for dtype, head_dim, length in itertools.product(SIZES, _tiles.HEAD_DIMS, (16, 32, 64, 128)):
            if dtype == "fp32" and head_dim > 64:
                continue  # the op refuses it
            for use in ({}, {"causal": True, "packed": True}, {"dropout": 0.1}):
                tile = _tiles.attention(length, length, head_dim, SIZES[dtype], "dropout" in use, backward, chip)
                facts = {"dtype": dtype, "head_dim": head_dim, "heads": 8, "arch": arch, "paper": False}
                yield attention(tile, f"L<={length}", backward=backward, **facts, **use)


def info_nce(part: str, name: str, *, dtype: str = "bf16", width: int = 512, tile: InfoNCETile | None = None, **more) -> Compilation:
    """The InfoNCE kernel ``part`` ("unit", "fwd", "fwd_loss", "bwd", "sum"), as its launcher would call it with ``tile``."""
    head, tail = _tiles.halves(width)
    padded = head + tail
    mixed = {"rows_ptr": dtype, "columns_ptr": dtype, "unit_ptr": dtype, "faults": "i32"}
    if part == "bwd":
        mixed["out_ptr"] = dtype
    tensors, numbers, constants = {
        "unit": (
            ("rows_ptr", "columns_ptr", "unit_ptr", "norm_ptr", "faults"),
            ("rows", "columns", "row_stride", "column_stride"),
            {"DIM": width, "WIDTH": padded, "BLOCK": (size := _tiles.power_of_two(padded)), "COUNT": max(1, 4096 // size)},
        ),
        "fwd": (
            ("unit_ptr", "norm_ptr", "scale_ptr", "row_ptr", "column_ptr", "diagonal_ptr"),
            ("rows", "columns", "offset", "steps"),
            {"WIDTH": padded, **_cut(tile), "BLOCK_D": min(tile.piece, padded & -padded) if tile else 0},
        ),
        "fwd_loss": (
            ("row_ptr", "column_ptr", "diagonal_ptr", "row_out", "column_out", "softmax_ptr", "miss_ptr", "loss_ptr"),
            ("rows", "columns", "offset", "row_parts", "column_parts", "share"),
            {"LOSS": True, "PARTS": 16, "BLOCK": 512},
        ),
        "bwd": (
            ("unit_ptr", "norm_ptr", "softmax_ptr", "miss_ptr", "scale_ptr", "grad_ptr", "out_ptr", "terms_ptr"),
            ("rows", "columns", "offset", "share"),
            {"DIM": width, "HEAD": head, "TAIL": tail, **_cut(tile)},
        ),
        "sum": (("terms_ptr", "factor_ptr", "out_ptr"), ("count", "share"), {"BLOCK": 2048}),
    }[part]
    absent = {"row_out": None, "column_out": None} if part == "fwd_loss" else {}
    constants |= {"FP64": False, **absent}
    signature = {tensor: f"*{mixed.get(tensor, 'fp32')}" for tensor in tensors} | dict.fromkeys(numbers, "i32")
    product = part in ("fwd", "bwd")
    cut = f" ({tile.rows}x{tile.columns}, {tile.warps} warps, {tile.stages} stages)" if tile else ""
    return Compilation(
        name=f"info_nce_{part}",
        kernel=f"fastidc_kernels._info_nce{'_bwd' if part == 'bwd' else ''}:info_nce_{part}_kernel",
        config=f"{name} D={width} {dtype}{cut}",
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        divisible=tuple(x for x in signature if x not in absent and x.endswith(("_ptr", "_stride", "faults"))),
        warps=tile.warps if tile else 4 if part == "unit" else 8,
        stages=tile.stages if tile else 3,
        declares="mma" if product and SIZES[dtype] == 2 else "wide_loads" if (product or part == "unit") and width >= 64 else "nothing",
        **more,
    )


def _cut(tile: InfoNCETile | None) -> dict[str, int]:
    return {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns} if tile else {}


def _info_nces() -> Iterator[Compilation]:
    """The paper's width at batches of one multiprocessor and of many, ViT-L/14's, then every tile with every dtype and other widths."""
    for arch in ("sm_90", "sm_80"):
        chip = int(arch.removeprefix("sm_"))

        def both(
            count: int, width: int, dtype: str = "bf16", *, passes=("fwd", "bwd"), arch=arch, chip=chip, **more
        ) -> Iterator[Compilation]:
            for part in passes:
                tile = getattr(_tiles, f"info_nce_{part}")(count, width, SIZES[dtype], chip)
                yield info_nce(part, f"B={count}", dtype=dtype, width=width, tile=tile, arch=arch, **more)

        for part in ("unit", "fwd_loss", "sum"):
            yield info_nce(part, "any B", arch=arch)
        yield from both(128, 512)
        yield from both(1024, 512, passes=("fwd",))
        yield from both(16384, 512)
        yield from both(128, 768, passes=("bwd",))
        yield from both(16384, 768)
        for dtype, width, count in itertools.product(SIZES, (24, 64, 128, 256, 264, 384, 512, 640, 768, 1000, 1024), (128, 1024, 16384)):
            yield from both(count, width, dtype, paper=False)


def linear_cross_entropy(
    part: str, name: str, *, dtype: str = "bf16", width: int = 512, tile: LinearCrossEntropyTile | None = None, **more
) -> Compilation:
    """The linear cross entropy kernel ``part`` ("pack", "fwd", "loss", "fwd_loss", "fwd_sum", "bwd", "bwd_bias", "bwd_scale"), as its launcher would
    call it with ``tile``. "loss" is the forward kernel without the rows' gradient."""
    pieces, piece = _tiles.linear_cross_entropy_pieces(width)
    padded, cut = pieces * piece, {"PIECES": pieces, "SLICE": piece}
    table, read = ("packed_ptr", "weight_ptr", "bias_ptr"), ("lse_ptr", "words_ptr", "count_ptr", "grad_ptr")
    whole = {"DIM": width, **cut, **({"BLOCK_R": tile.rows, "BLOCK_V": tile.words} if tile else {})}
    narrow = min(piece, tile.piece) if tile and part == "bwd_bias" else piece
    forward = ((*table, "count_ptr", "statistic_ptr", "mixture_ptr"), ("rows", "vocabulary", "steps"), whole)
    tensors, numbers, constants = {
        "pack": (
            ("x_ptr", "targets_ptr", "packed_ptr", "order_ptr", "words_ptr", "count_ptr", "fault_ptr"),
            ("rows", "vocabulary", "ignore_index", "x_stride"),
            {
                "DIM": width,
                "WIDTH": padded,
                "BLOCK": _tiles.power_of_two(padded),
                "COUNT": _tiles.linear_cross_entropy_packed(width),
                "SCAN": 2048,
            },
        ),
        "fwd": forward,
        "loss": forward,
        "fwd_loss": (
            ("statistic_ptr", "mixture_ptr", *table, "order_ptr", "words_ptr", "count_ptr", "terms_ptr", "lse_ptr", "out_ptr"),
            ("rows", "parts"),
            {"DIM": width, **cut, "COUNT": 1024 // piece},
        ),
        "fwd_sum": (("terms_ptr", "count_ptr", "out_ptr"), ("rows",), {"BLOCK": 2048}),
        "bwd": ((*table, *read, "weight_out", "bias_out"), ("vocabulary",), whole),
        "bwd_bias": ((*table, *read, "bias_out"), ("vocabulary",), {**whole, "PIECES": padded // narrow, "SLICE": narrow}),
        "bwd_scale": (("gradient_ptr", "grad_ptr", "count_ptr", "out_ptr"), ("rows",), {"DIM": width, "BLOCK": 4096}),
    }[part]
    types = dict.fromkeys(("x_ptr", "packed_ptr", "weight_ptr", "weight_out", "gradient_ptr"), dtype) | {"targets_ptr": "i64"}
    types |= dict.fromkeys(("order_ptr", "words_ptr", "count_ptr", "fault_ptr"), "i32")
    types |= {"out_ptr": dtype} if part in ("fwd_loss", "bwd_scale") else {}
    absent = {"mixture_ptr": None} if part == "loss" else {}
    constants |= absent | ({} if part == "pack" else {"FP64": False})
    signature = {tensor: f"*{types.get(tensor, 'fp32')}" for tensor in tensors} | dict.fromkeys(numbers, "i32")
    shape = f" ({tile.rows} rows x {tile.words} words, {tile.warps} warps, {tile.stages} stages)" if tile else ""
    backward = "_bwd" if part.startswith("bwd") else ""
    return Compilation(
        name=f"linear_cross_entropy_{part}",
        kernel=f"fastidc_kernels._linear_cross_entropy{backward}:linear_cross_entropy_{'fwd' if part == 'loss' else part}_kernel",
        config=f"{name} D={width} {dtype}{shape}",
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        divisible=tuple(x for x in signature if x not in absent and x.endswith(("_ptr", "_out", "_stride"))),
        warps=tile.warps if tile else 8 if part == "fwd_sum" else 4,
        stages=tile.stages if tile else 3,
        declares="mma"
        if tile and SIZES[dtype] == 2
        else "wide_loads"
        if width >= 64 and part not in ("fwd_sum", "bwd_bias")
        else "nothing",
        **more,
    )


def _linear_cross_entropies() -> Iterator[Compilation]:
    """The paper's width in bf16, and ViT-L/14's rows, then every tile with every dtype and other widths."""
    products = ("fwd", "loss", "bwd", "bwd_bias")
    for arch in ("sm_90", "sm_80"):
        chip = int(arch.removeprefix("sm_"))

        def entry(part: str, width: int, dtype: str = "bf16", *, arch=arch, chip=chip, **more) -> Compilation:
            tile = _tiles.linear_cross_entropy(part, width, SIZES[dtype], chip) if part in products else None
            return linear_cross_entropy(part, "captions", dtype=dtype, width=width, tile=tile, arch=arch, **more)

        for part in (*products, "pack", "fwd_loss", "fwd_sum", "bwd_scale"):
            yield entry(part, 512)
        yield entry("fwd", 768)
        for dtype, width in itertools.product(SIZES, (48, 64, 128, 256, 384, 512, 640, 768, 1000, 1024)):
            if dtype == "fp32" and width > 256:
                continue  # the op refuses it
            for part in (*products, "pack", "fwd_loss"):
                yield entry(part, width, dtype, paper=False)


_ADAM_TYPES = {"chunk_ptr": "*i32", "size_ptr": "*i64", "first_ptr": "*i32", "group_ptr": "*i32", "skip_ptr": "*i32"}


def bert_adam(
    part: str, name: str, tile: BertAdamTile | None = None, *, grad: str = "fp32", shadow: str = "none", clipped: bool = True, **more
) -> Compilation:
    """BertAdam's kernel ``part`` ("norms", "sums", "scales", "update"), as its launcher would call it with ``tile``. Addresses of tensors come from
    a table, so nothing is declared of them: the kernel asks."""
    absent = {"given_ptr": None} if clipped else {"sum_ptr": None}
    tables = ("grad_table", *(f"{of}_table" for of in ("param", "first", "second", "shadow")))
    tensors, numbers, constants = {
        "norms": (("chunk_ptr", "size_ptr", "grad_table", "partial_ptr"), {}, {"GRAD": grad}),
        "sums": (("first_ptr", "partial_ptr", "sum_ptr"), {}, {"BLOCK": 512}),
        "scales": (
            ("sum_ptr", "group_ptr", "fact_ptr", "given_ptr", "scale_ptr", "norm_ptr", "skip_ptr", "skipped_ptr"),
            {"clip_norm": "fp32", "tensors": "i32"},
            {**absent, "BLOCK": 512},
        ),
        "update": (
            ("chunk_ptr", "size_ptr", *tables, "ceiling_ptr", "group_ptr", "fact_ptr", "rate_ptr", "scale_ptr", "skip_ptr"),
            {},
            {"GRAD": grad, "SHADOW": shadow},
        ),
    }[part]
    if tile:
        constants |= {"CHUNK": tile.chunk, "BLOCK": tile.block if part == "update" else tile.norm_block}
    types = _ADAM_TYPES | dict.fromkeys(tables, "*i64")
    signature = {tensor: types.get(tensor, "*fp32") for tensor in tensors} | numbers | dict.fromkeys(constants, "constexpr")
    shape = f" ({tile.chunk} elements a program, {constants['BLOCK']} at a time, {tile.warps} warps)" if tile else ""
    return Compilation(
        name=f"bert_adam_{part}",
        kernel=f"fastidc_kernels._bert_adam:bert_adam_{part}_kernel",
        config=f"{name}{shape}",
        signature=signature,
        constants=constants,
        divisible=tuple(tensor for tensor in tensors if tensor not in constants),
        warps=tile.warps if tile else 4,
        stages=3,
        declares="wide_loads" if tile else "nothing",
        **more,
    )


def _bert_adams() -> Iterator[Compilation]:
    """fp32 gradients, as every recipe has them, with and without half-precision copies; then what else the op takes."""
    for arch in ("sm_90", "sm_80"):
        tile = _tiles.bert_adam(int(arch.removeprefix("sm_")))
        yield bert_adam("norms", "fp32", tile, arch=arch)
        yield bert_adam("sums", "fp32", arch=arch, paper=False)
        yield bert_adam("scales", "fp32", arch=arch, paper=False)
        yield bert_adam("update", "fp32", tile, arch=arch)
        yield bert_adam("update", "fp32, bf16 copies", tile, shadow="bf16", arch=arch)
        yield bert_adam("scales", "norm given", clipped=False, arch=arch, paper=False)
        for grad in ("fp16", "bf16"):
            yield bert_adam("norms", f"{grad} gradients", tile, grad=grad, arch=arch, paper=False)
            for shadow in ("none", "fp16"):
                yield bert_adam("update", f"{grad} gradients, copies: {shadow}", tile, grad=grad, shadow=shadow, arch=arch, paper=False)


COMPILATIONS: tuple[Compilation, ...] = (
    *_attentions(),
    *_info_nces(),
    *_linear_cross_entropies(),
    *_bert_adams(),
    *kernels_rows.compilations(),
)
