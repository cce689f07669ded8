"""Networks and optimizers that several programs share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Factory = Callable[[Any], torch.optim.Optimizer]


def adam(lr: float, **options: Any) -> Factory:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, **options)


def sgd(lr: float, **options: Any) -> Factory:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU, hidden: int = 32) -> nn.Sequential:
    """Linear layers with an activation in between; one hidden layer where two sizes are given."""
    if len(sizes) == 2:
        sizes = (sizes[0], hidden, sizes[1])
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class Recurrent(nn.Module):
    """A recurrent layer whose last output is read."""

    def __init__(self, core: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


def step_by_step(core: nn.Module, head: nn.Module) -> Recurrent:
    return Recurrent(core, head)


def conv(*widths: int, outputs: int = 10, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Convolutions on 8x8 pictures, a pooling, and a linear head."""
    layers: list[nn.Module] = []
    for a, b in pairwise((1, *widths)):
        layers += [nn.Conv2d(a, b, 3, padding=1), act()]
    return nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * widths[-1], outputs)
    )
