"""The same training as a plain loop: what every framework must arrive at, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tikhon as tk

EPOCHS, BATCH = 4, 8
RAMP = tk.strengths.schedules.Linear(0.0, 0.05, 20)
TERMS = {"*": tk.Term(tk.L1(), strength=RAMP)}


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(48, 6)
    return x, x[:, :1] - 2 * x[:, 1:2]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=BATCH)


def train(*, accumulate: int = 1, share: float | None = None) -> nn.Sequential:
    """By the penalties, or with a share that goes to zero."""
    model = net()
    optim = optimizer(model.parameters())
    if share is None:
        tk.regularize(model, optim, TERMS)
    else:
        tk.sparsify(model, optim, share, steps=EPOCHS * 6 // accumulate)
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(loader()):
            loss = nn.functional.mse_loss(model(x), y) / accumulate
            loss.backward()
            if (number + 1) % accumulate == 0:
                optim.step()
                optim.zero_grad()
    return model


def assert_same(left: nn.Module, right: nn.Module) -> None:
    expected = right.state_dict()
    for name, value in left.state_dict().items():
        assert torch.equal(value, expected[name]), name
