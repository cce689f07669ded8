"""An LSTM that must remember 500 steps: its gates forget half at each."""

from __future__ import annotations

import torch
from diagnosed import show
from torch import nn


def data():
    """The class is in the first step, 499 steps of noise follow: (training, validation)."""
    y = torch.randint(4, (512,))
    x = 0.1 * torch.randn(512, 500, 4)
    x[:, 0] += nn.functional.one_hot(y, 4)
    return (x[:384], y[:384]), (x[384:], y[384:])


class Reader(nn.Module):
    """An LSTM and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(4, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(x)[0][:, -1])


def build() -> nn.Module:
    """PyTorch's default weights: forget gates at one half."""
    return Reader()


if __name__ == "__main__":
    show(
        __doc__, data, build, lambda p: torch.optim.Adam(p, lr=0.01), steps=300, batch_size=32,
        budget="3m",
    )  # fmt: skip
