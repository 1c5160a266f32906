"""Vocabulary projection and cross entropy without logits in memory: the loss and the rows' gradient from one pass over the vocabulary.

x [N, D], weight [V, D], bias [V], targets [N], of which some are pads. The loss is the mean over the others of -log softmax(x W^T + b)[target];
its gradient with respect to a row, softmax(x W^T + b) W - W[target], is attention with K = V = W, so a pass that keeps a running maximum has
both. The gradient of the bias, and that of the words, need the log-sum-exp: a second pass, one program a tile of words, without atomics.

    packed, order, words, count = linear_cross_entropy_pack(x, targets, V, ignore_index, faults)
    statistic, mixture = linear_cross_entropy_fwd(packed, weight, bias, count, wanted)
    loss, lse, gradient = linear_cross_entropy_loss(statistic, mixture, packed, weight, bias, order, words, count)
    gradient = linear_cross_entropy_scale(gradient, grad, count)  # of x
    weight_grad, bias_grad = linear_cross_entropy_bwd(grad, packed, weight, bias, lse, words, count, True, True)

Rows with a target are packed to the front on the device and ``count`` of them are computed; the host knows N alone, launches for N, and
programs past the count leave at once. ``packed`` [N, W] holds them, W >= D zeros at the end, ``order`` [N] the row of each place, rows left out at the end, and ``words`` [N] its
target, -1 where it has none. ``statistic`` [P, S, 2, N] and ``mixture`` [P, N, D] hold P parts of the vocabulary: for each of S slices of
columns a maximum in units of log 2 and a sum of 2^(s - maximum), and words mixed with those weights. ``lse`` [N] is in units of log 2, inf past
the count. ``gradient`` [N, D] is that of the sum, which fp16 can hold where that of a mean over thousands of rows is too small.

Nothing is added up by two programs, so the same call gives the same bits.
"""

import functools

import torch
from torch import Tensor

from fastidc_kernels import _launch, _tiles
from fastidc_kernels import _linear_cross_entropy as kernels
from fastidc_kernels import _linear_cross_entropy_bwd as backward


def linear_cross_entropy_pack(
    x: Tensor, targets: Tensor, vocabulary: int, ignore_index: int, faults: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], each row's numbers side by side; targets [N], contiguous, of any integer dtype -> packed [N, W], order and words int32 [N], count
    int32 [1]. faults: int32 [1]; a target that is neither ``ignore_index`` nor a word is left out, and the flag becomes at least 2^31 - 1 - row
    of the first."""
    rows, width = x.shape
    pieces, piece = _tiles.linear_cross_entropy_pieces(width)
    packed = x.new_empty(rows, pieces * piece)
    order, words = (torch.empty_like(targets, dtype=torch.int32) for _ in range(2))
    count = torch.empty_like(faults)
    each = _tiles.linear_cross_entropy_packed(width)
    static = {"DIM": width, "WIDTH": pieces * piece, "BLOCK": _tiles.power_of_two(pieces * piece), "COUNT": each, "SCAN": 2048}
    tensors = (x, targets, packed, order, words, count, faults)
    facts = (rows, vocabulary, ignore_index, x.stride(0))
    with _launch.on(x.device):
        kernels.linear_cross_entropy_pack_kernel[(-(-rows // each),)](*tensors, *facts, **static, num_warps=4)
    return packed, order, words, count


def linear_cross_entropy_fwd(
    packed: Tensor, weight: Tensor, bias: Tensor, count: Tensor, wanted: bool, tile: _tiles.LinearCrossEntropyTile | None = None
) -> tuple[Tensor, Tensor | None]:
    """weight [V, D], contiguous -> statistic [P, S, 2, N] and, where the rows' gradient is ``wanted``, mixture [P, N, D]. tile: the table's where
    none is given."""
    rows, (vocabulary, width) = len(packed), weight.shape
    pieces, piece = _tiles.linear_cross_entropy_pieces(width)
    tile = tile or _tiles.linear_cross_entropy("fwd" if wanted else "loss", *_facts(packed, width))
    slices = pieces if wanted else 1
    programs = -(-rows // tile.rows) * slices
    steps = _tiles.linear_cross_entropy_steps(programs, vocabulary, tile, _processors(packed.device))
    parts = -(-vocabulary // (steps * tile.words))
    statistic = packed.new_empty(parts, slices, 2, rows, dtype=_launch.statistic(packed.dtype))
    mixture = statistic.new_empty(parts, rows, width) if wanted else None
    with _launch.on(packed.device):
        kernels.linear_cross_entropy_fwd_kernel[(programs * parts,)](
            *(packed, weight, bias, count, statistic, mixture, rows, vocabulary, steps),
            **{"DIM": width, "PIECES": pieces, "SLICE": piece, **_cut(tile), "FP64": packed.dtype == torch.float64},
            **_launch.options(tile),
        )
    return statistic, mixture


def linear_cross_entropy_loss(
    statistic: Tensor,
    mixture: Tensor | None,
    packed: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor,
    words: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parts put together in a fixed order -> loss [], lse [N] and, where there is a mixture, the gradient [N, D] of the sum of losses with
    respect to the rows as they came, in their dtype, 0 for pads."""
    rows, width = len(packed), weight.shape[1]
    pieces, piece = _tiles.linear_cross_entropy_pieces(width)
    terms, lse, loss = (statistic.new_empty(shape) for shape in ((rows,), (rows,), ()))
    out = None if mixture is None else packed.new_empty(rows, width)
    each = 1024 // piece
    static = {"DIM": width, "PIECES": pieces, "SLICE": piece, "COUNT": each}
    tensors = (statistic, mixture, packed, weight, bias, order, words, count, terms, lse, out)
    wide = {"FP64": packed.dtype == torch.float64}
    with _launch.on(packed.device):
        kernels.linear_cross_entropy_fwd_loss_kernel[(-(-rows // each),)](*tensors, rows, len(statistic), **static, **wide, num_warps=4)
        kernels.linear_cross_entropy_fwd_sum_kernel[(1,)](terms, count, loss, rows, BLOCK=2048, **wide, num_warps=8)
    return loss, lse, out


def linear_cross_entropy_scale(gradient: Tensor, grad: Tensor, count: Tensor) -> Tensor:
    """gradient [N, D] of a sum, contiguous -> that of ``grad`` [] times the mean, rounded once."""
    out = torch.empty_like(gradient)
    rows, width = gradient.shape
    static = {"DIM": width, "BLOCK": 4096, "FP64": gradient.dtype == torch.float64}
    with _launch.on(gradient.device):
        backward.linear_cross_entropy_bwd_scale_kernel[(-(-gradient.numel() // 4096),)](
            gradient, grad, count, out, rows, **static, num_warps=4
        )
    return out


def linear_cross_entropy_bwd(
    grad: Tensor,
    packed: Tensor,
    weight: Tensor,
    bias: Tensor,
    lse: Tensor,
    words: Tensor,
    count: Tensor,
    of_weight: bool,
    of_bias: bool,
    tile: _tiles.LinearCrossEntropyTile | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and of bias that are asked for, in their dtypes. No word is multiplied for that of the bias alone, which costs
    half as much."""
    vocabulary, width = weight.shape
    pieces, piece = _tiles.linear_cross_entropy_pieces(width)
    tile = tile or _tiles.linear_cross_entropy("bwd" if of_weight else "bwd_bias", *_facts(packed, width))
    weight_grad = torch.empty_like(weight) if of_weight else None
    bias_grad = bias.new_empty(vocabulary) if of_bias else None
    read = (packed, weight, bias, lse, words, count, grad)
    tiles, static = -(-vocabulary // tile.words), {**_cut(tile), "FP64": packed.dtype == torch.float64, **_launch.options(tile)}
    with _launch.on(packed.device):
        if of_weight:
            cut = {"DIM": width, "PIECES": pieces, "SLICE": piece}
            backward.linear_cross_entropy_bwd_kernel[(tiles * pieces,)](*read, weight_grad, bias_grad, vocabulary, **cut, **static)
        elif of_bias:
            part = min(piece, tile.piece)
            cut = {"DIM": width, "PIECES": pieces * piece // part, "SLICE": part}
            backward.linear_cross_entropy_bwd_bias_kernel[(tiles,)](*read, bias_grad, vocabulary, **cut, **static)
    return weight_grad, bias_grad


def _cut(tile: _tiles.LinearCrossEntropyTile) -> dict[str, int]:
    return {"BLOCK_R": tile.rows, "BLOCK_V": tile.words}


def _facts(packed: Tensor, width: int) -> tuple[int, int, int]:
    """Width, bytes of a number and architecture for the tables; the interpreter, whatever its dtype, walks half precision's blocks."""
    return width, packed.element_size() if packed.is_cuda else 2, _launch.arch(packed.device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. The interpreter has few, so that small inputs come in several parts too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
