"""s = x + residual and its LayerNorm in one pass over memory, and the backward pass with the gradients of weight and bias in one more.

    y, s, mean, rstd = layer_norm_fwd(x, residual, weight, bias, eps)
    dx, dweight, dbias, y = layer_norm_bwd(grad, s_grad, s, mean, rstd, weight, bias, of_weights, again)

Rows are whole in a program's registers, at most `_tiles.WIDEST` numbers each; statistics are fp32 (fp64 for fp64). The sum is rounded to x's
dtype before it is normalised, as two operators would do it. ``dx`` is the gradient of x and of the residual alike: the norm's part plus
``s_grad``, what reaches s by other ways. A fixed number of programs share out the rows of the backward pass and leave their parts of the
weight's and bias's gradients, which a small launch adds up in a fixed order: no atomics, the same bits every time.
"""

import torch
from torch import Tensor

from fastidc_kernels import _launch, _tiles
from fastidc_kernels import _layer_norm as kernels


def layer_norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [R, C], a row's numbers side by side; weight, bias [C] contiguous -> y [R, C] and s [R, C], empty without a residual, in x's
    dtype; mean and rstd [R]."""
    rows, width = x.shape
    y, s = x.new_empty(rows, width), x.new_empty((rows, width) if residual is not None else (0,))
    mean, rstd = (x.new_empty(rows, dtype=_launch.statistic(x.dtype)) for _ in range(2))
    if not rows:
        return y, s, mean, rstd
    tile = _tiles.layer_norm(width, backward=False)
    tensors = (x, residual, weight, bias, y, s if residual is not None else None, mean, rstd)
    facts = (rows, x.stride(0), 0 if residual is None else residual.stride(0))
    static = {"EPS": eps, "WIDTH": width, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "FP64": x.dtype == torch.float64}
    with _launch.on(x.device):
        kernels.layer_norm_fwd_kernel[(-(-rows // tile.rows),)](*tensors, *facts, **static, **_launch.options(tile))
    return y, s, mean, rstd


def layer_norm_bwd(
    grad: Tensor,
    s_grad: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_weights: bool,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad, s_grad, s [R, C], a row's numbers side by side -> dx [R, C] in s's dtype; where ``of_weights``, dweight and dbias [C] in weight's; and
    where ``again``, y once more, for which alone bias is read. What is not asked for is empty."""
    rows, width = s.shape
    tile = _tiles.layer_norm(width, backward=True)
    programs = _tiles.row_programs(rows, tile, 1, processors(s.device))
    dx, y = s.new_empty(rows, width), s.new_empty((rows, width) if again else (0,))
    dweight, dbias = (weight.new_empty(width if of_weights else 0) for _ in range(2))
    parts = mean.new_empty((programs, 2, width) if of_weights else (0,))
    if rows:
        tensors = (grad, s_grad, s, mean, rstd, weight, bias if again else None, dx, y if again else None, parts if of_weights else None)
        facts = (rows, grad.stride(0), 0 if s_grad is None else s_grad.stride(0), s.stride(0))
        static = {"WIDTH": width, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "FP64": s.dtype == torch.float64}
        with _launch.on(s.device):
            kernels.layer_norm_bwd_kernel[(programs,)](*tensors, *facts, **static, **_launch.options(tile))
    if of_weights:
        sum_of_parts(parts, dweight, dbias)
    return dx, dweight, dbias, y


def sum_of_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """parts [P, 1 or 2, C], P may be 0 -> their sums over P, in ``first`` and ``second`` [C]."""
    tile = _tiles.SUM_OF_PARTS
    grid = (-(-len(first) // tile.columns), 1 if second is None else 2)
    static = {"WIDTH": len(first), "BLOCK_P": tile.rows, "BLOCK_C": tile.columns, "FP64": parts.dtype == torch.float64}
    with _launch.on(parts.device):
        kernels.sum_of_parts_kernel[grid](parts, first, second, len(parts), **static, **_launch.options(tile))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. The interpreter has one, so that its programs walk several blocks too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
