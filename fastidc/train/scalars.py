"""Curves for TensorBoard."""

import importlib
from collections.abc import Mapping
from pathlib import Path

from fastidc.errors import FastidcError


def check_tensorboard() -> None:
    """FastidcError where TensorBoard's writer cannot be imported."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise FastidcError(
            f"--tensorboard needs the package tensorboard, which cannot be imported ({error}); pip install tensorboard."
        ) from None


class Scalars:
    """Writes numbers by step into ``folder``, where ``tensorboard --logdir`` finds them; a context manager. after: the step from which a run goes
    on; what it had written of later ones is not shown."""

    def __init__(self, folder: Path, after: int = 0):
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def add(self, values: Mapping[str, float], step: int, group: str) -> None:
        """Numbers of one step, shown under ``group``/name; what is no number is left out."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> "Scalars":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
