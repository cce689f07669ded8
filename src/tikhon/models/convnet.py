"""A small convolutional network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.layers import Dropout


class ConvNet(nn.Module):
    """Two 3x3 convolutions with pooling, 2x2 average pooling, one linear layer.

    Works for images of 4x4 and larger. `width` is the number of channels of the first layer,
    `rate` in [0, 1) the dropout rate before the last.

    >>> ConvNet(1, 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, outputs: int, *, width: int = 16, rate: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.dropout1 = Dropout(rate)
        self.fc1 = nn.Linear(2 * width * 4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, height, width) -> (rows, outputs)."""
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.relu(self.conv2(x))
        return self.fc1(self.dropout1(F.adaptive_avg_pool2d(x, 2).flatten(1)))
