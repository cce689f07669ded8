"""A residual network without normalisation: its size doubles block by block."""

from __future__ import annotations

import torch
from diagnosed import digits, show
from torch import nn


def images():
    """With a channel axis."""
    return tuple((x[:, None], y) for x, y in digits())


class Block(nn.Module):
    """x + conv(relu(conv(x))), He weights, no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU()
        self.last = nn.Conv2d(width, width, 3, padding=1)
        for layer in (self.first, self.last):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.act(self.first(x)))


def build() -> nn.Module:
    """Twenty blocks of eight channels."""
    blocks = [Block(8) for _ in range(20)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(512, 10))


if __name__ == "__main__":
    show(__doc__, images, build, lambda p: torch.optim.SGD(p, lr=0.05), steps=60)
