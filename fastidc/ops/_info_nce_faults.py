"""Embeddings that are not finite: noted on the device while a step runs, asked for when the engine logs."""

import torch
from torch import Tensor

_LAST = 2**31 - 1  # a fault is _LAST - row, so that the largest names the first row and 0 none
_faults: dict[tuple[torch.device, int], Tensor] = {}


def faults_of(device: torch.device, each: int = 0) -> Tensor:
    """int32 [2], of texts and of pairs, for who finds an embedding that is not finite to raise; one a device, kept, so that a captured graph
    can write to it. In a group, whose pairs are those of all ranks, one for every number ``each`` of pairs of a rank."""
    key = device, each
    if key not in _faults:
        made = torch.zeros(2, dtype=torch.int32, device=device)
        if type(made) is not Tensor:  # of somebody who only looks at shapes
            return made
        _faults[key] = made
    return _faults[key]


def take_faults() -> list[str]:
    """What was not finite since the last call, in sentences. Waits for the device."""
    out = []
    for (_, each), flags in _faults.items():
        for name, flag in zip(("text", "pair"), flags.tolist(), strict=True):
            if not flag:
                continue
            row, owner = _LAST - flag, "its batch"
            if each and name == "pair":
                row, owner = row % each, f"process {row // each}'s batch"
            out.append(f"The contrastive loss met a {name} embedding that is not finite, first in row {row} of {owner}.")
        flags.zero_()
    return out


@torch.library.custom_op("fastidc::info_nce_note", mutates_args={"faults"})
def note_faults(text: Tensor, pair: Tensor, faults: Tensor) -> None:
    """What `fastidc_kernels.info_nce.info_nce_unit` notes in passing, for those who do without it. text [N, E], pair [M, E]."""
    for i, x in enumerate((text, pair)):
        code = torch.arange(_LAST, _LAST - len(x), -1, dtype=torch.int32, device=x.device)
        found = code.masked_fill_(x.isfinite().all(dim=1), 0).amax()
        faults[i] = torch.maximum(faults[i], found)


@note_faults.register_fake
def _(text, pair, faults):
    return None
