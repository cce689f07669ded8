"""Row losses of all members, minimised and scored by a population."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.data.forward import call_model
from tikhon.data.nested import Batch
from tikhon.errors import InputError
from tikhon.training.losses import loss_of


class RowLosses:
    """Row losses of stacked outputs, with label smoothing for each member.

    `loss` is anything `tikhon.training.losses.loss_of` takes that is a mean over rows; "auto"
    depends on the targets `y`. `batch_only` is the reason why there are no row losses, or "": then
    there is one member, trained on the loss of whole batches.
    """

    def __init__(self, loss: object, y: Tensor | None = None) -> None:
        self.loss = loss_of(loss, y)
        self.batch_only = "the loss calls the model itself" if self.loss.kind == "whole" else ""
        self._checked = False

    @torch.no_grad()
    def probe(self, model: nn.Module, batch: Batch) -> None:
        """Check on some rows whether the loss is a mean over rows, for a single output tensor."""
        if self.batch_only or len(batch[1]) < 2:
            return
        try:
            output = call_model(model.eval(), batch[0])
            if not isinstance(output, Tensor):
                self.batch_only = f"the model returns a {type(output).__name__}, not one tensor"
            elif self.loss.entries is None:
                self.batch_only = self._why_not_mean(output, batch[1])
        except Exception:  # training will raise it too
            return

    def on(self, model: nn.Module, batch: Batch, smoothing: Tensor | None = None) -> Tensor:
        """Run the forward pass of one model on a batch; return its mean loss."""
        if smoothing is None and self.batch_only:
            return self.loss.on(model, batch)
        return self.mean(call_model(model, batch[0]), batch[1], smoothing)

    @property
    def is_classification(self) -> bool:
        """Whether outputs are class logits."""
        return self.loss.name == "cross_entropy"

    def rows(self, output: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Losses (members, rows) of outputs (members, rows, ...) against targets (rows, ...)."""
        members, count = output.shape[:2]
        if smoothing is not None and not self.is_classification:
            raise InputError("label_smoothing needs the loss cross_entropy")
        _, targets = self.loss.align(output[0], y)
        if self.loss.entries is not None and self.loss.kind in ("numbers", "binary"):
            flat = output.reshape(members, count, -1), targets.reshape(1, count, -1)
            return self.loss.entries(*torch.broadcast_tensors(*flat)).mean(-1)
        if self.is_classification and output.ndim == 3:
            return self._cross_entropy(output, targets, smoothing)
        self._check(output[0], y)
        single = torch.func.vmap(lambda o, t: self.loss(o[None], t[None]))
        return torch.func.vmap(single, in_dims=(0, None))(output, y)

    def _cross_entropy(self, output: Tensor, y: Tensor, smoothing: Tensor | None) -> Tensor:
        members, count, classes = output.shape
        flat, shares = output.reshape(members * count, classes), y.is_floating_point()
        if smoothing is None:
            targets = y if members == 1 else y.repeat(members, *[1] * (y.ndim - 1))
            return self.loss.rows(flat, targets).view(members, count)
        log = flat.log_softmax(-1).view(members, count, classes)
        where = y.expand(members, count, classes) if shares else y.expand(members, count)
        right = (log * where).sum(-1) if shares else log.gather(2, where[..., None]).squeeze(-1)
        share = smoothing.to(log)[:, None]
        return -(1 - share) * right - share * log.mean(-1)

    def mean(self, output: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Mean loss of one model's outputs (rows, ...), by torch's fused form."""
        if smoothing is None:
            return self.loss(output, y)
        if not self.is_classification:
            raise InputError("label_smoothing needs the loss cross_entropy")
        output, y = self.loss.align(output, y)
        return F.cross_entropy(output, y, label_smoothing=float(smoothing))

    def _check(self, output: Tensor, y: Tensor) -> None:
        """Check once that the loss is a mean over rows, as members and folds weight rows."""
        if self._checked or len(output) < 2 or not bool(torch.isfinite(output).all()):
            return
        if why := self._why_not_mean(output, y):
            raise InputError(
                f"{why}, and what trains many models at once weighs rows one by one: use a mean "
                "over rows (no sum, no weights of classes)"
            )
        self._checked = True

    @torch.no_grad()
    def _why_not_mean(self, output: Tensor, y: Tensor) -> str:
        """Return why a batch loss is not the mean of its row losses, or ""."""
        whole, rows = self.loss(output, y), self.loss.rows(output, y)
        if torch.allclose(whole.double(), rows.double().mean(), rtol=1e-3, equal_nan=True):
            return ""
        return (
            f"the loss {self.loss.name} is not the mean of the losses of its rows "
            f"({float(whole):.4g} against {float(rows.mean()):.4g})"
        )


def weighted_mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Mean losses (members,) over the rows kept by each member's weights."""
    if weights is None:
        return rows.mean(1)
    return (rows * weights).sum(1) / weights.sum(1).clamp_min(1)
