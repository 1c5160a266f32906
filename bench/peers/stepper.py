"""What a whole-step bench drives: one model of one stage with its optimiser, ours or a peer's."""

from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastidc.data.loaders import PairBatch

Stage = Literal["adapt", "finetune"]
PAIRS_A_STAGE = {"adapt": 1, "finetune": 2}  # of a CLEVR-Change sample

# Each module of this folder has
#   build(config: ModelConfig, state: dict[str, Tensor] | None, stage: Stage, device, compiled: bool = False, **its own) -> Stepper
# where ``state`` has the official parameter names (`fastidc.checkpoint.to_official`); None means random initialisation.


class Stepper(Protocol):
    """``batch`` is a `PairBatch` on the stepper's device, or what `prepare` made of one. Nothing but `prepare` copies between devices."""

    model: nn.Module

    def prepare(self, batch: PairBatch) -> Any:
        """What this stepper's own loader would have handed over, on the device; not part of a step. Every method takes either."""

    def forward_backward(self, batch: Any) -> Tensor:
        """Loss (a detached scalar on the device) of a batch; its gradients are in the parameters afterwards. Sets training mode."""

    def optimizer_step(self) -> None:
        """Clips, updates and clears the gradients."""

    def step(self, batch: Any) -> Tensor:
        """`forward_backward`, then `optimizer_step`."""

    def generate(self, batch: Any, max_length: int = 32) -> Tensor:
        """Greedy captions of every pair, ids [B, P, max_length] int64; what follows the end token has no meaning."""
