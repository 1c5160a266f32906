"""What a stage optimises: a list of objectives over one encoder, each with its own head, weight and data."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastidc.data.loaders import PairBatch


class Objective(Protocol):
    """A named loss. ``encoded`` is what `CLIP4IDC.encode_batch` made of the batch's images."""

    name: str
    weight: float
    reads_tokens: bool  # False where the pair's embedding is enough

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Adaptation:
    """Symmetric InfoNCE between (before, after) and its caption (paper eq. 6 to 8)."""

    name: str = "info_nce"
    weight: float = 1.0
    reads_tokens: bool = False

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        return model.text_pair_loss(encoded[0][:, 0], batch.text_ids)


@dataclass(frozen=True)
class Captioning:
    """Cross entropy of every pair's caption, each kind of pair with its own token mean, summed (clip4idc.md 3)."""

    name: str = "caption"
    weight: float = 1.0
    reads_tokens: bool = True

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        return model.token_losses(encoded[1], batch.input_ids, batch.target_ids).sum()


STAGES: dict[str, tuple[Objective, ...]] = {"adapt": (Adaptation(),), "finetune": (Captioning(),)}
