"""A post-norm transformer at full learning rate from the first step, without warm-up."""

from __future__ import annotations

import torch
from diagnosed import digits, show
from torch import nn


class Reader(nn.Module):
    """Rows as tokens, six post-norm layers, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.02 * torch.randn(8, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 128, 0.0, batch_first=True) for _ in range(6)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


def build() -> nn.Module:
    """Six layers."""
    return Reader()


if __name__ == "__main__":
    show(__doc__, digits, build, lambda p: torch.optim.Adam(p, lr=0.02), steps=100)
