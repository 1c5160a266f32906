"""Compilations of LayerNorm and QuickGELU; see `bench.kernels`."""

import itertools
from collections.abc import Iterator

from bench.compilation import SIZES, Compilation
from fastidc_kernels import _tiles


def rows(op: str, width: int, dtype: str = "bf16", *, backward: bool, beside: bool, weights: str = "fp32", **more) -> Compilation:
    """A kernel of "layer_norm" or "quick_gelu". ``beside``: with the residual, or the bias; backward with its gradient, the sums over rows and the
    forward result once more."""
    norm, part = op == "layer_norm", "bwd" if backward else "fwd"
    tile = (_tiles.layer_norm if norm else _tiles.quick_gelu)(width, backward)
    tensors = {
        ("layer_norm", "fwd"): ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "s_ptr", "mean_ptr", "rstd_ptr"),
        ("layer_norm", "bwd"): (
            *("grad_ptr", "s_grad_ptr", "s_ptr", "mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "out_ptr", "y_ptr", "part_ptr"),
        ),
        ("quick_gelu", "fwd"): ("x_ptr", "bias_ptr", "y_ptr"),
        ("quick_gelu", "bwd"): ("grad_ptr", "x_ptr", "bias_ptr", "out_ptr", "y_ptr", "part_ptr"),
    }[op, part]
    strides = {("layer_norm", "fwd"): ("x", "residual"), ("layer_norm", "bwd"): ("grad", "s_grad", "s")}.get((op, part), ("grad", "x"))
    strides = tuple(f"{name}_stride" for name in (strides if norm or backward else ("x",)))
    needed = ("bias_ptr",) if norm and not backward else ()
    optional = [x for x in ("residual_ptr", "s_grad_ptr", "bias_ptr", "part_ptr") if x in tensors and x not in needed]
    optional += ["s_ptr"] if norm and not backward else ["y_ptr"] if backward else []
    absent = {} if beside else dict.fromkeys(optional)
    constants = absent | ({"EPS": 1e-5} if norm and not backward else {})
    constants |= {"WIDTH": width, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "FP64": False}
    types = {"weight_ptr": weights, "bias_ptr": weights, "mean_ptr": "fp32", "rstd_ptr": "fp32", "part_ptr": "fp32"}
    signature = {tensor: f"*{types.get(tensor, dtype)}" for tensor in tensors} | dict.fromkeys(("rows", *strides), "i32")
    extra = {False: "", True: " residual" if norm else " bias"}[beside] + (" and all else" if beside and backward else "")
    return Compilation(
        name=f"{op}_{part}",
        kernel=f"fastidc_kernels._{op}:{op}_{part}_kernel",
        config=f"C={width} {dtype}{extra} ({tile.rows}x{tile.columns}, {tile.warps} warps)",
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        divisible=tuple(x for x in signature if x not in absent and x.endswith(("_ptr", "_stride"))),
        warps=tile.warps,
        stages=tile.stages,
        declares="wide_loads" if width >= 64 else "nothing",
        **more,
    )


def sum_of_parts(width: int, outs: int, **more) -> Compilation:
    """What adds up the parts that programs leave of sums over rows."""
    tile, absent = _tiles.SUM_OF_PARTS, {} if outs == 2 else {"second_ptr": None}
    constants = absent | {"WIDTH": width, "BLOCK_P": tile.rows, "BLOCK_C": tile.columns, "FP64": False}
    signature = {"part_ptr": "*fp32", "first_ptr": "*fp32", "second_ptr": "*fp32", "parts": "i32"} | dict.fromkeys(constants, "constexpr")
    return Compilation(
        name="sum_of_parts",
        kernel="fastidc_kernels._layer_norm:sum_of_parts_kernel",
        config=f"C={width} x {outs}",
        signature=signature,
        constants=constants,
        divisible=tuple(x for x in signature if x not in absent and x.endswith("_ptr")),
        warps=tile.warps,
        declares="wide_loads",
        **more,
    )


def compilations() -> Iterator[Compilation]:
    """The vision tower's in bf16 as its blocks call them; then the text tower's, ViT-L/14's and what else the ops take."""
    yield rows("layer_norm", 768, backward=False, beside=True)
    yield rows("layer_norm", 768, backward=True, beside=True)
    yield rows("quick_gelu", 3072, backward=True, beside=True)
    yield from (sum_of_parts(width, outs, paper=False) for width, outs in ((512, 2), (768, 2), (3072, 1)))
    for backward, beside in itertools.product((False, True), (False, True)):
        use = {"backward": backward, "beside": beside, "paper": False}
        yield from (rows("layer_norm", width, dtype, **use) for dtype in SIZES for width in (48, 96, 512, 640, 768, 1024))
        yield from (rows("quick_gelu", width, dtype, **use) for dtype in SIZES for width in (48, 96, 2048, 3072, 4096))
        yield rows("layer_norm", 768, weights="bf16", **use)
