"""Large contrastive batches on small memory: embeddings first, then the loss, then the towers again, a chunk at a time (GradCache, Gao et al. 2021).

The contrastive loss needs the embeddings of a whole batch but the activations of none: its gradient with respect to the embeddings is all
that the towers have to be told. The gradient is that of the whole batch at once; what it costs is a second forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastidc import ops
from fastidc.data.loaders import PairBatch
from fastidc.train.objectives import Adaptation


@dataclass(frozen=True)
class Embeddings:
    """What the loss reads of a chunk, in the place of a loss: [2, B, E], texts and pairs, not normalised."""

    name: str = "embeddings"
    weight: float = 1.0
    reads_tokens: bool = False

    def loss(self, model, batch: PairBatch, encoded: tuple[Tensor, Tensor]) -> Tensor:
        pair, text = encoded[0][:, 0], model.encode_text(batch.text)
        return torch.stack([text.to(pair.dtype), pair])


def backward_in_chunks(trainer, chunks: Sequence[PairBatch], objective: Adaptation, share: float, waits: bool) -> Tensor:
    """Adds the gradient of ``share`` times the loss of a batch, which ``chunks`` are together, to the parameters, with the activations of one of
    them at a time; returns ``share`` times the loss. ``trainer``: a `fastidc.train.engine.Trainer`; with ``waits`` the gradients stay in
    this process."""
    task = (Embeddings(),)
    with torch.no_grad(), trainer.precision.autocast():
        parts = [trainer.model(chunk, task)["embeddings"] for chunk in chunks]
    text, pair = torch.cat(parts, dim=1).requires_grad_().unbind(0)
    scale = trainer.model.logit_scale.detach().requires_grad_()
    group = objective.world.group
    with trainer.precision.autocast():
        loss = objective.weight * share * ops.info_nce(text, pair, scale, group=group, gather_grad=objective.gather_grad)
    of_text, of_pair, of_scale = torch.autograd.grad(trainer.optimizer.scaler.scale(loss), [text, pair, scale])
    gradient = torch.stack([of_text, of_pair]).split([len(chunk) for chunk in chunks], dim=1)
    for i, (chunk, of_chunk) in enumerate(zip(chunks, gradient, strict=True)):
        last = i + 1 == len(chunks)
        with trainer.gradients_stay(waits or not last):
            with trainer.precision.autocast():
                embeddings = trainer.wrapped(chunk, task)["embeddings"]
            outputs, gradients = [embeddings], [of_chunk]
            if last:  # the temperature is in no tower; here, so that its gradient too is averaged over processes
                outputs.append(trainer.model.logit_scale)
                gradients.append(of_scale)
            torch.autograd.backward(outputs, gradients)
    return loss.detach()
