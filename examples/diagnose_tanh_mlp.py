"""A tanh network of 30 layers with PyTorch's default weights: the signal dies on its way back."""

from __future__ import annotations

import torch
from diagnosed import digits, show
from torch import nn


def flat():
    """As rows of 64 numbers."""
    return tuple((x.flatten(1), y) for x, y in digits())


def build() -> nn.Module:
    """Thirty tanh layers."""
    hidden = [m for _ in range(30) for m in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


if __name__ == "__main__":
    show(__doc__, flat, build, lambda p: torch.optim.SGD(p, lr=0.1), steps=300)
