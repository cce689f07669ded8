"""LeNet-5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.layers import Dropout


class LeNet5(nn.Module):
    """Two convolutions with pooling, then three linear layers, for images of 28x28 or 32x32.

    `rate` in [0, 1) is the dropout rate of the hidden linear layers.
    Reference: LeCun et al., "Gradient-based learning applied to document recognition" (1998),
    with ReLU and max pooling in place of its tanh and its subsampling.

    >>> LeNet5(1, 10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, outputs: int, *, side: int = 28, rate: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2 if side == 28 else 0)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.dropout1 = Dropout(rate)
        self.fc2 = nn.Linear(120, 84)
        self.dropout2 = Dropout(rate)
        self.fc3 = nn.Linear(84, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, side, side) -> (rows, outputs)."""
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = self.dropout1(torch.relu(self.fc1(x.flatten(1))))
        x = self.dropout2(torch.relu(self.fc2(x)))
        return self.fc3(x)
