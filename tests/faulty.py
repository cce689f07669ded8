"""Small training programs with one fault each, and healthy ones: no file is needed for them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CE = nn.CrossEntropyLoss()


@dataclass(frozen=True, eq=False)
class Faulty:
    """A program, the codes of which at least one must be found, and the layers at fault."""

    name: str
    codes: tuple[str, ...]
    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Any], Tensor] = CE
    options: dict[str, Any] = field(default_factory=dict)
    where: tuple[str, ...] = ()


def classes(rows: int = 400, size: int = 16, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Four Gaussian classes that a linear model tells apart."""
    generator = torch.Generator().manual_seed(7)
    y = torch.randint(4, (rows,), generator=generator)
    centres = 1.5 * torch.randn(4, size, generator=generator)
    return scale * (centres[y] + torch.randn(rows, size, generator=generator)), y


def numbers(rows: int = 300) -> tuple[Tensor, Tensor]:
    """A line with noise."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(rows, 6, generator=generator)
    y = x @ torch.tensor([[1.0], [-1.0], [0.5], [0.0], [0.0], [0.3]])
    return x, y + 0.2 * torch.randn(rows, 1, generator=generator)


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation in between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def he(model: nn.Module, std: float | None = None, bias: float = 0.0) -> nn.Module:
    """Normal weights: He's, or of one deviation."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            deviation = std if std is not None else (2 / layer.in_features) ** 0.5
            nn.init.normal_(layer.weight, 0, deviation)
            nn.init.constant_(layer.bias, bias)
    return model


def changed(
    model: nn.Sequential, index: int | tuple[int, ...], change: Callable[[Any], Any]
) -> nn.Module:
    """A He model with some layers changed."""
    he(model)
    with torch.no_grad():
        for position in (index,) if isinstance(index, int) else index:
            change(model[position])
    return model


def sgd(lr: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, lr=lr, **options)


def adam(lr: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.AdamW(p, lr=lr, **{"weight_decay": 0.0, **options})


def deep(count: int, act: type[nn.Module], width: int = 16) -> nn.Sequential:
    return mlp(16, *[width] * count, 4, act=act)


FAULTY = [
    Faulty("sigmoid stack", ("vanishing_gradient",), lambda: deep(10, nn.Sigmoid), sgd(0.1),
           classes),
    Faulty("tanh default", ("vanishing_gradient", "poor_init"), lambda: deep(25, nn.Tanh),
           sgd(0.05), classes),
    Faulty("two bad layers", ("poor_init",),
           lambda: changed(deep(8, nn.ReLU, 32), (4, 10), lambda m: m.weight.mul_(1e-4)),
           sgd(0.02), classes, where=("4", "10")),
    Faulty("large weights", ("exploding_gradient",), lambda: he(deep(10, nn.ReLU), 1.5), sgd(0.05),
           classes),
    Faulty("huge step", ("exploding_gradient", "dying_relu"), lambda: he(deep(2, nn.ReLU)),
           sgd(1e4), classes),
    Faulty("dead at birth", ("dying_relu",),
           lambda: changed(deep(3, nn.ReLU, 32), 2, lambda m: m.bias.fill_(-50)), sgd(0.1),
           classes, where=("2", "3")),
    Faulty("saturated at birth", ("saturated_activation",), lambda: he(deep(8, nn.Tanh), 2.0),
           sgd(0.02), classes, where=("0", "1")),
    Faulty("equal weights", ("poor_init",), lambda: he(deep(2, nn.Tanh), 0.0), sgd(0.1), classes),
    Faulty("too small a step", ("slow_convergence",), lambda: he(deep(2, nn.ReLU)), sgd(1e-6),
           classes),
    Faulty("softmax twice", ("slow_convergence",),
           lambda: nn.Sequential(*deep(2, nn.ReLU), nn.Softmax(-1)), adam(1e-3), classes,
           where=("5",)),
    Faulty("jumping", ("oscillating_loss", "dying_relu", "exploding_gradient"),
           lambda: he(deep(2, nn.ReLU)), sgd(1.0, momentum=0.95), classes,
           options={"batch_size": 2}),
    Faulty("memorised", ("overfitting",), lambda: he(deep(2, nn.ReLU, 128)), adam(0.003),
           lambda: _noisy(60), options={"valid": lambda: _noisy(200, 9)}),
    Faulty("penalised", ("underfitting",), lambda: he(deep(2, nn.ReLU)), adam(1e-2),
           classes, options={"penalty": lambda m: 5 * sum(p.abs().sum() for p in m.parameters())}),
    Faulty("dropped", ("underfitting",),
           lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.99), nn.Linear(8, 4)),
           adam(3e-4), classes, where=("2",)),
    Faulty("rectified output", ("dying_relu", "head_mismatch"),
           lambda: nn.Sequential(*mlp(6, 16, 1), nn.ReLU()), sgd(0.05), numbers, nn.MSELoss(),
           where=("3",)),
]  # fmt: skip


def _noisy(rows: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator)
    y = (x[:, 0] > 0).long()
    flip = torch.rand(rows, generator=generator) < 0.3
    return x, torch.where(flip, 1 - y, y)


class Functional(nn.Module):
    """Activations as functions, which no module hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


HEALTHY = [
    Faulty("relu", (), lambda: he(deep(2, nn.ReLU, 32)), adam(0.003), classes),
    Faulty("default", (), lambda: deep(2, nn.ReLU, 32), adam(0.005), classes),
    Faulty("functional", (), Functional, adam(0.01), classes),
    Faulty("zero head", (),
           lambda: changed(deep(2, nn.ReLU, 32), 4, lambda m: m.weight.zero_()), sgd(0.1),
           classes),
    Faulty("norm first", (), lambda: nn.Sequential(nn.BatchNorm1d(16), *deep(2, nn.Tanh, 32)),
           adam(0.005), lambda: classes(scale=100.0)),
    Faulty("tiny loss", (), lambda: he(deep(2, nn.ReLU, 32)), adam(0.003), classes,
           lambda o, y: 1e-5 * CE(o, y)),
    Faulty("line", (), lambda: mlp(6, 16, 1), adam(0.01), numbers, nn.MSELoss()),
]  # fmt: skip


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "versions": [p._version for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "requires": [p.requires_grad for p in model.parameters()],
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b
