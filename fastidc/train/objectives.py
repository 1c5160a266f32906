"""What a stage optimises: a list of objectives over one encoder, each with its own head, weight and data."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastidc.config import Recipe
from fastidc.data.loaders import PairBatch
from fastidc.train.distributed import ALONE, World


class Objective(Protocol):
    """A named loss. ``encoded`` is what `CLIP4IDC.encode_batch` made of the batch's images."""

    name: str
    weight: float
    reads_tokens: bool  # False where the pair's embedding is enough

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Adaptation:
    """Symmetric InfoNCE between (before, after) and its caption, over the pairs of all processes (paper eq. 6 to 8)."""

    name: str = "info_nce"
    weight: float = 1.0
    reads_tokens: bool = False
    world: World = ALONE
    gather_grad: str = "full"  # see `fastidc.ops.info_nce`

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        return model.text_pair_loss(encoded[0][:, 0], batch.text, group=self.world.group, gather_grad=self.gather_grad)


@dataclass(frozen=True)
class Captioning:
    """Cross entropy of every pair's caption, each kind of pair with its own token mean, summed (clip4idc.md 3).

    Over several processes the official mean is that of each process's own tokens ("process"), whatever their number; "global" divides by
    the tokens of all, so that the number of processes changes nothing.
    """

    name: str = "caption"
    weight: float = 1.0
    reads_tokens: bool = True
    world: World = ALONE
    token_mean: str = "process"

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        if batch.captions is None:
            means = model.token_losses(encoded[1], batch.input_ids, batch.target_ids)  # [P]
        else:
            means = model.packed_token_losses(encoded[1], batch.captions)
        if self.token_mean == "global" and self.world.size > 1:
            own = batch.target_counts().to(means.dtype)
            means = means * (own * self.world.size / self.world.sum(own.clone()).clamp(min=1))
        return means.sum()


def objectives(stage: str, recipe: Recipe, world: World) -> tuple[Objective, ...]:
    """What ``stage`` ("adapt" or "finetune") trains."""
    if stage == "adapt":
        return (Adaptation(world=world, gather_grad=recipe.gather_grad),)
    return (Captioning(world=world, token_mean=recipe.token_mean),)
