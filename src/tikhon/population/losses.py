"""The loss of every row of every member: what a population minimises and is scored by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.errors import InputError, unknown

_NAMES = {
    "cross_entropy": "cross_entropy",
    "mse": "squared",
    "squared": "squared",
}
_FUNCTIONS = {F.cross_entropy: "cross_entropy", F.mse_loss: "squared"}


class Objective:
    """Row losses of stacked outputs, with a label smoothing of each member's own.

    `loss` is "cross_entropy", "mse", the functions or modules of torch with these names, or any
    function (output, target) -> scalar that is a mean over rows.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.kind = self._recognised(loss)

    @staticmethod
    def _recognised(loss: Any) -> str:
        if isinstance(loss, str):
            if loss not in _NAMES:
                raise InputError(unknown("loss", loss, _NAMES))
            return _NAMES[loss]
        if isinstance(loss, nn.CrossEntropyLoss):
            plain = loss.weight is None and not loss.label_smoothing
            return "cross_entropy" if plain and loss.reduction == "mean" else "custom"
        if isinstance(loss, nn.MSELoss):
            return "squared" if loss.reduction == "mean" else "custom"
        if not callable(loss):
            raise InputError(f"loss must be a function (output, target) -> scalar, not {loss!r}")
        return _FUNCTIONS.get(loss, "custom")

    def rows(self, output: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """(members, rows) losses of outputs (members, rows, ...) against targets (rows, ...)."""
        members, count = output.shape[:2]
        if self.kind == "squared":
            difference = output.reshape(members, count, -1) - y.reshape(1, count, -1)
            return difference.square().mean(-1)
        if self.kind == "cross_entropy":
            flat = output.reshape(members * count, -1)
            targets = y if members == 1 else y.repeat(members)
            if smoothing is None:
                return F.cross_entropy(flat, targets, reduction="none").view(members, count)
            log = flat.log_softmax(-1)
            right = log.gather(1, targets[:, None]).view(members, count)
            share = smoothing.to(log)[:, None]
            return -(1 - share) * right - share * log.mean(-1).view(members, count)
        if smoothing is not None:
            raise InputError("label_smoothing needs loss='cross_entropy'")
        call: Callable = self.loss
        single = torch.func.vmap(lambda o, t: call(o[None], t[None]))
        return torch.func.vmap(single, in_dims=(0, None))(output, y)

    def mean(self, output: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """The mean loss of one model's outputs (rows, ...), in torch's fused form."""
        if self.kind == "squared":
            return F.mse_loss(output.reshape(len(output), -1), y.reshape(len(output), -1))
        if self.kind == "cross_entropy":
            share = 0.0 if smoothing is None else float(smoothing)
            return F.cross_entropy(output.reshape(len(output), -1), y, label_smoothing=share)
        return self.rows(output.unsqueeze(0), y, smoothing).mean()


def mean_over(rows: Tensor, weights: Tensor | None) -> Tensor:
    """(members,) mean losses, over the rows that a member's weights keep."""
    if weights is None:
        return rows.mean(1)
    return (rows * weights).sum(1) / weights.sum(1).clamp_min(1)
