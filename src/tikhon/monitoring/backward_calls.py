"""Losses that go backward, and gradients that are clipped, in a sampled step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from tikhon.monitoring.hooks import CallHook
from tikhon.monitoring.loss_graph import LossGraph, read_loss_graph

# `Tensor.backward` and everything built on it, and `clip_grad_norm_`, call these
_HOOKS = (
    CallHook(torch.autograd, "backward", "record"),
    CallHook(clip_grad, "_clip_grads_with_norm_", "record_clip"),
)


class BackwardCalls:
    """The losses that went backward, what their graphs show, and calls of `clip_grad_norm_`."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.graphs: list[LossGraph] = []
        self.early_clips: list[Tensor] = []  # norms that were clipped before a backward pass
        self.has_late_clip = False
        self._optimized: set[int] = set()

    def start(self, optimizer: Optimizer) -> None:
        """Record, from here to `stop`."""
        self.__init__()
        self._optimized = {id(p) for g in optimizer.param_groups for p in g["params"]}
        for hook in _HOOKS:
            hook.add(self)

    def stop(self) -> None:
        """Record no more."""
        for hook in _HOOKS:
            hook.remove(self)

    @property
    def has_equal_losses(self) -> bool:
        """Whether they are losses of one kind, none of them a share."""
        is_share = any(graph.share < 1 for graph in self.graphs)
        return len({graph.operation for graph in self.graphs}) == 1 and not is_share

    @property
    def share(self) -> float:
        """The numbers by which the last loss was divided, as a factor."""
        return self.graphs[-1].share if self.graphs else 1.0

    @property
    def factor(self) -> Tensor | None:
        """What the last loss was multiplied by at its end."""
        return self.graphs[-1].factor if self.graphs else None

    def record(self, tensors: Tensor | Sequence[Tensor], *rest: object) -> None:
        """The tensors of one backward pass."""
        for root in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(root, Tensor) and root.numel() == 1 and root.is_floating_point():
                self.losses.append(root.detach().reshape(()))
                self.graphs.append(read_loss_graph(root))

    def record_clip(
        self, parameters: Tensor | Iterable[Tensor], limit: float, norm: Tensor, *rest: object
    ) -> None:
        """A call of `clip_grad_norm_` on tensors of the optimizer."""
        clipped = [parameters] if isinstance(parameters, Tensor) else parameters
        if math.isfinite(limit) and any(id(p) in self._optimized for p in clipped):
            if self.losses:
                self.has_late_clip = True
            else:
                self.early_clips.append(norm.detach())
