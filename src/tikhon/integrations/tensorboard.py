"""Log the penalties of a Regularizer to TensorBoard.

Works with any writer that has `add_scalar`: `torch.utils.tensorboard`'s, `tensorboardX`'s.
"""

from __future__ import annotations

from typing import Protocol

from tikhon.integrations.readings import readings
from tikhon.regularizer.regularizer import Regularizer


class Writer(Protocol):
    """The interface of a SummaryWriter used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Write one point."""
        ...


def log(
    writer: Writer,
    regularizer: Regularizer,
    step: int | None = None,
    *,
    per_parameter: bool = False,
) -> None:
    """Write the `readings` at `step` (default: the Regularizer's own)."""
    at = regularizer.steps if step is None else step
    for tag, value in readings(regularizer, per_parameter=per_parameter).items():
        writer.add_scalar(tag, value, at)
