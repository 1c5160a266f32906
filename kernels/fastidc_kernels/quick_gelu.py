"""y sigmoid(1.702 y) with y = x + bias, and its derivative with the bias's gradient in the same pass.

    out = quick_gelu_fwd(x, bias)
    dx, dbias, out = quick_gelu_bwd(grad, x, bias, of_bias, again)

Arithmetic is fp32 (fp64 for fp64), and nothing is kept but x. As in `layer_norm`, programs leave parts of the bias's gradient that are added up
in a fixed order.
"""

import torch
from torch import Tensor

from fastidc_kernels import _launch, _tiles
from fastidc_kernels import _quick_gelu as kernels
from fastidc_kernels.layer_norm import processors, sum_of_parts


def quick_gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, C], a row's numbers side by side; bias [C] contiguous, or None -> [R, C] in x's dtype."""
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if rows:
        tile, across = _cut(width, backward=False)
        with _launch.on(x.device):
            kernels.quick_gelu_fwd_kernel[(-(-rows // tile.rows) * across,)](
                x, bias, out, rows, x.stride(0), **_static(x, tile), **_launch.options(tile)
            )
    return out


def quick_gelu_bwd(grad: Tensor, x: Tensor, bias: Tensor | None, of_bias: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x [R, C], a row's numbers side by side -> dx [R, C] in x's dtype; where ``of_bias``, dbias [C] in the bias's; where ``again``, what the
    forward pass gave. What is not asked for is empty."""
    rows, width = x.shape
    tile, across = _cut(width, backward=True)
    programs = _tiles.row_programs(rows, tile, across, processors(x.device))
    dx, out = x.new_empty(rows, width), x.new_empty((rows, width) if again else (0,))
    dbias = (x if bias is None else bias).new_empty(width if of_bias else 0)
    wide = _launch.statistic(x.dtype)
    parts = x.new_empty((programs, 1, width) if of_bias else (0,), dtype=wide)
    if rows:
        tensors = (grad, x, bias, dx, out if again else None, parts if of_bias else None)
        with _launch.on(x.device):
            kernels.quick_gelu_bwd_kernel[(programs * across,)](
                *tensors, rows, grad.stride(0), x.stride(0), **_static(x, tile), **_launch.options(tile)
            )
    if of_bias:
        sum_of_parts(parts, dbias)
    return dx, dbias, out


def _cut(width: int, backward: bool) -> tuple[_tiles.RowsTile, int]:
    """The tile, and how many of them lie side by side."""
    tile = _tiles.quick_gelu(width, backward)
    return tile, -(-width // tile.columns)


def _static(x: Tensor, tile: _tiles.RowsTile) -> dict:
    return {"WIDTH": x.shape[1], "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "FP64": x.dtype == torch.float64}
