"""One BertAdam step over many tensors: norms, clips, moments, update and half-precision copies of the weights in two sweeps over memory.

T tensors in G groups; every gradient, its norm and the clip factors stay on the device, so a step waits for nothing and can be captured.

    table = bert_adam_table(sizes, groups, ceilings, facts, device)                 # once for the same tensors
    sums = bert_adam_sums(table, grads, grad_dtype)                                 # sweep 1, and one program a tensor
    norm = bert_adam_scales(table, sums, clip_norm, given, skipped)                 # one program
    bert_adam_update(table, grads, params, firsts, seconds, shadows, rates, ...)    # sweep 2

``grads``, ``params``, ``firsts``, ``seconds`` and ``shadows`` are int64 [T] on the device: addresses of dense tensors, 0 for a shadow that there is
not. Parameters and moments are fp32, gradients fp32, fp16 or bf16, all alike; shadows are bf16 or fp16. ``facts`` fp32 [G, 7] has a group's
beta1, 1 - beta1, beta2, 1 - beta2 (differences of the numbers as given, not of their fp32 roundings), eps, decay, and the most that the norm
of one tensor may be (inf: not clipped); ``ceilings`` fp32 [T] what no element may exceed afterwards.

A tensor is cut into chunks and a program has one; the table knows which, so a bias costs one program and a matrix its share. Whole chunks at
addresses that are multiples of 16 move 128 bits at a time, others an element. Nothing is added up by two programs: the same bits every time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastidc_kernels import _bert_adam as kernels
from fastidc_kernels import _launch, _tiles

FACTS = kernels.FACTS
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Table(NamedTuple):
    """What stays the same from step to step, on the device, and a step's scratch."""

    tile: _tiles.BertAdamTile
    chunks: Tensor  # int32 [P, 2]: tensor, and which chunk of it
    first: Tensor  # int32 [T + 1]: a tensor's first chunk
    sizes: Tensor  # int64 [T]
    groups: Tensor  # int32 [T]
    ceilings: Tensor  # fp32 [T]
    facts: Tensor  # fp32 [G, 7]
    partials: Tensor  # fp32 [P]
    sums: Tensor  # fp32 [T]
    scales: Tensor  # fp32 [T]
    skip: Tensor  # int32 [1]


def send(values: Tensor, device: torch.device) -> Tensor:
    """values, on the host, as a tensor on ``device``, without waiting for it: the copy starts in page-locked memory that torch keeps until then."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.clone()


def bert_adam_table(
    sizes: Sequence[int],
    groups: Sequence[int],
    ceilings: Sequence[float],
    facts: Sequence[Sequence[float]],
    device: torch.device,
    tile: _tiles.BertAdamTile | None = None,
) -> Table:
    """sizes, groups and ceilings of T tensors, facts of G groups -> the table. tile: the architecture's where none is given."""
    tile = tile or _tiles.bert_adam(_launch.arch(device))
    size = torch.tensor(sizes, dtype=torch.int64)
    count = (size + tile.chunk - 1) // tile.chunk
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])
    tensor = torch.repeat_interleave(torch.arange(len(size)), count)
    chunks = torch.stack([tensor, torch.arange(len(tensor)) - first[tensor]], 1)
    host = (
        chunks.int(),
        first.int(),
        size,
        torch.tensor(groups, dtype=torch.int32),
        torch.tensor(ceilings, dtype=torch.float32),
        torch.tensor(facts, dtype=torch.float32).view(-1, FACTS),
    )
    scratch = [torch.empty(n, dtype=torch.float32, device=device) for n in (len(chunks), len(size), len(size))]
    return Table(tile, *(send(values, device) for values in host), *scratch, torch.empty(1, dtype=torch.int32, device=device))


def bert_adam_sums(table: Table, grads: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """Addresses of gradients -> their sums of squares [T], in the table's scratch."""
    tile = table.tile
    static = {"GRAD": _NAMES[grad_dtype], "CHUNK": tile.chunk, "BLOCK": tile.norm_block}
    with _launch.on(grads.device):
        if len(table.chunks):
            kernels.bert_adam_norms_kernel[(len(table.chunks),)](
                table.chunks, table.sizes, grads, table.partials, **static, num_warps=tile.warps, enable_fp_fusion=True
            )
        kernels.bert_adam_sums_kernel[(len(table.sizes),)](table.first, table.partials, table.sums, BLOCK=512, num_warps=4)
    return table.sums


def bert_adam_scales(table: Table, sums: Tensor | None, clip_norm: float, given: Tensor | None, skipped: Tensor) -> Tensor:
    """The global norm [] fp32. With it, in the table: what the gradients are multiplied by, and whether the update is left out, because the norm is
    not finite; ``skipped`` fp32 [] then grows by one. given: the norm [] where it is known, and nothing is clipped to it; sums may be None then,
    and no tensor is clipped either."""
    norm = torch.empty((), dtype=torch.float32, device=table.scales.device)
    tensors = (sums, table.groups, table.facts, given, table.scales, norm, table.skip, skipped)
    with _launch.on(norm.device):
        kernels.bert_adam_scales_kernel[(1,)](*tensors, float(clip_norm), len(table.sizes), BLOCK=512, num_warps=4)
    return norm


def bert_adam_update(
    table: Table,
    grads: Tensor,
    params: Tensor,
    firsts: Tensor,
    seconds: Tensor,
    shadows: Tensor,
    rates: Tensor,
    grad_dtype: torch.dtype,
    shadow_dtype: torch.dtype | None,
) -> None:
    """rates fp32 [G]: of this step. Writes parameters, moments and shadows, or nothing where the update is left out."""
    tile = table.tile
    static = {"GRAD": _NAMES[grad_dtype], "SHADOW": _NAMES[shadow_dtype] if shadow_dtype else "none"}
    addresses = (grads, params, firsts, seconds, shadows)
    tensors = (*addresses, table.ceilings, table.groups, table.facts, rates, table.scales, table.skip)
    if not len(table.chunks):
        return
    with _launch.on(grads.device):
        kernels.bert_adam_update_kernel[(len(table.chunks),)](
            table.chunks, table.sizes, *tensors, **static, CHUNK=tile.chunk, BLOCK=tile.block, num_warps=tile.warps, enable_fp_fusion=True
        )
