"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tikhon.layers import Dropout


class MLP(nn.Module):
    """Linear layers `fc1`, `fc2`, ... with ReLU and dropout between them.

    `sizes` are the widths from input to output, two or more; rows of any shape are flattened.
    `rate` in [0, 1) is the dropout rate of every hidden layer.

    >>> MLP([784, 128, 10])(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int], *, rate: float = 0.0) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        last = len(sizes) - 1
        for i, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))
            if i < last:
                self.add_module(f"dropout{i}", Dropout(rate))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (rows, outputs)."""
        x = x.flatten(1)
        last = len(self.sizes) - 1
        for i in range(1, last):
            x = torch.relu(getattr(self, f"fc{i}")(x))
            x = getattr(self, f"dropout{i}")(x)
        return getattr(self, f"fc{last}")(x)
