"""The kernels of `fastidc_kernels.bert_adam` behind `fastidc.ops.BertAdamStep`: tables of addresses, and when they are made anew."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastidc.errors import FastidcError
from fastidc.ops._dispatch import Spec
from fastidc.ops._triton import refusals


def unsupported(spec: Spec) -> list[str]:
    """Why the kernels cannot serve on this device, in sentences. ``spec.dtype`` is not asked: of a run it is what the model multiplies in, and
    parameters that are not fp32 are refused where they are seen."""
    return refusals(spec._replace(dtype=torch.float32))


class _Part(NamedTuple):
    """Tensors whose gradients have one dtype: a launch of each sweep. Their sums, their scales and whether they are left out stand in the table
    of all tensors."""

    dtype: torch.dtype
    table: NamedTuple
    addresses: tuple[Tensor, ...]  # int64 [T] each, of gradients, parameters, first moments, second moments, shadows


class Tables:
    """Addresses on the device of everything that one optimiser steps over. Parameters and moments are looked up anew where one of them is
    another than at the step before, gradients are sent whenever their addresses change, which is one small copy that nothing waits for."""

    def __init__(self) -> None:
        self._key = None
        self._kept: list = []  # what captured graphs read and write

    def step(self, groups: Sequence, rates: Tensor, clip_norm: float | None, given: Tensor | None, ceiling, skipped: Tensor) -> Tensor:
        """See `fastidc.ops.BertAdamStep`; rates fp32 [G] on the device. Returns the norm."""
        from fastidc_kernels import bert_adam as kernels

        dense = [g.contiguous() for group in groups for g in group.grads]
        self._bring_up_to_date(groups, ceiling, rates.device, [g.dtype for g in dense])
        self._send_gradients(dense)
        sums = None
        if given is None or any(group.max_norm is not None for group in groups):
            for part in self._parts:
                kernels.bert_adam_sums(part.table, part.addresses[0], part.dtype)
            sums = self._table.sums
        clip = math.inf if clip_norm is None or given is not None else clip_norm
        norm = kernels.bert_adam_scales(self._table, sums, clip, given, skipped)
        for part in self._parts:
            kernels.bert_adam_update(part.table, *part.addresses, rates, part.dtype, self._shadow_dtype)
        return norm

    def _bring_up_to_date(self, groups: Sequence, ceiling, device: torch.device, dtypes: list[torch.dtype]) -> None:
        parts = [[[0 if x is None else x.data_ptr() for x in part] for part in _state(group)] for group in groups]
        facts = [_facts(group) for group in groups]
        place, most = (ceiling[0].data_ptr(), ceiling[1]) if ceiling else (0, math.inf)
        sizes = [p.numel() for group in groups for p in group.params]
        key = (parts, facts, place, most, sizes, device, dtypes)
        if key == self._key:
            return
        if _capturing(device):
            raise FastidcError("bert_adam: a graph cannot be captured with tensors that no step has seen; make one step before.")
        from fastidc_kernels import bert_adam as kernels

        self._shadow_dtype = _checked(groups, device)
        strange = [dtype for dtype in dtypes if dtype not in (torch.float32, torch.float16, torch.bfloat16)]
        if strange:
            raise FastidcError(f"bert_adam: backend 'triton' takes gradients in fp32, fp16 and bf16, not in {strange[0]}.")
        # tensors whose gradients are alike stand side by side
        kinds = list(dict.fromkeys(dtypes))
        self._order = order = sorted(range(len(sizes)), key=lambda i: kinds.index(dtypes[i]))
        member = [i for i, group in enumerate(groups) for _ in group.params]
        ceilings = [most if p == place else math.inf for params, *_ in parts for p in params]
        columns = [
            [p for part in parts for p in (part[column] if column < len(part) else [0] * len(part[0]))] for column in range(4)
        ]  # params, first moments, second moments, shadows
        arranged = [[column[i] for i in order] for column in (sizes, member, ceilings, *columns)]

        def table(rows: slice):
            return kernels.bert_adam_table(*(column[rows] for column in arranged[:3]), facts, device)

        self._table = table(slice(None))
        self._addresses = [
            torch.zeros(len(sizes), dtype=torch.int64, device=device),
            *(kernels.send(torch.tensor(column, dtype=torch.int64), device) for column in arranged[3:]),
        ]
        self._parts, end = [], 0
        for kind in kinds:
            rows = slice(end, end := end + dtypes.count(kind))
            joint = {name: getattr(self._table, name)[rows] for name in ("sums", "scales")} | {"skip": self._table.skip}
            own = self._table if len(kinds) == 1 else table(rows)._replace(**joint)
            self._parts.append(_Part(kind, own, tuple(column[rows] for column in self._addresses)))
        self._key, self._sizes, self._sent = key, sizes, None
        self._reserve: Tensor | None = None
        self._captured = False

    def _send_gradients(self, grads: list[Tensor]) -> None:
        """Has the device know where the gradients are, which are dense."""
        device = self._addresses[0].device
        for g, size in zip(grads, self._sizes, strict=True):
            if g.numel() != size or g.device != device:
                raise FastidcError(
                    f"bert_adam: backend 'triton' takes gradients with their parameters' shapes on {device}, got {g.dtype} {list(g.shape)} on "
                    f"{g.device}."
                )
        addresses = [grads[i].data_ptr() for i in self._order]
        target = self._addresses[0]
        if _capturing(device):
            # A replay copies from this memory again, so it must stay as it is; and page-locked memory is not to be had during a capture.
            if self._reserve is None:
                raise FastidcError("bert_adam: a second graph cannot be captured right after a first one; make one step between.")
            self._reserve.copy_(torch.tensor(addresses, dtype=torch.int64))
            target.copy_(self._reserve, non_blocking=True)
            self._kept.append((self._reserve, self._addresses, self._table, self._parts))
            self._reserve, self._captured = None, True
            return
        if device.type == "cuda" and self._reserve is None:
            self._reserve = torch.empty(len(addresses), dtype=torch.int64, pin_memory=True)
        if self._captured or addresses != self._sent:  # a replay has written its own addresses
            values = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
            target.copy_(values, non_blocking=True)
            self._sent = addresses


def rates_on(device: torch.device, lrs: Sequence[float]) -> Tensor:
    """fp32 [G] on ``device``, without waiting for it."""
    if _capturing(device):
        raise FastidcError("bert_adam: a graph would keep the rates of its capture; give them as a tensor on the device, and write to it.")
    from fastidc_kernels import bert_adam as kernels

    return kernels.send(torch.tensor(lrs, dtype=torch.float32), device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _state(group) -> list[Sequence[Tensor]]:
    return [group.params, group.first_moments, group.second_moments, *([group.shadows] if group.shadows is not None else [])]


def _facts(group) -> list[float]:
    """A row of the kernels' ``facts``."""
    (b1, b2), most = group.betas, math.inf if group.max_norm is None else group.max_norm
    return [b1, 1 - b1, b2, 1 - b2, group.eps, group.weight_decay, most]


def _checked(groups: Sequence, device: torch.device) -> torch.dtype | None:
    """The dtype of the shadows, None where there are none; FastidcError for what the kernels cannot address."""
    shadows = {s.dtype for group in groups for s in group.shadows or () if s is not None}
    if len(shadows) > 1 or shadows - {torch.float16, torch.bfloat16}:
        raise FastidcError(f"bert_adam: shadows are all in bf16 or all in fp16, got {', '.join(sorted(map(str, shadows)))}.")
    for group in groups:
        for p, *rest in zip(*_state(group), strict=True):
            for x in (p, *rest[:2]):
                if x.dtype != torch.float32:
                    raise FastidcError(f"bert_adam: backend 'triton' takes parameters and moments in fp32, got {x.dtype}; take 'torch'.")
            for x in (p, *(x for x in rest if x is not None)):
                if x.shape != p.shape or x.device != device or not x.is_contiguous():
                    raise FastidcError(
                        f"bert_adam: backend 'triton' takes dense tensors of one shape on {device}, got {list(p.shape)} and "
                        f"{list(x.shape)} with strides {list(x.stride())} on {x.device}."
                    )
    return next(iter(shadows), None)
