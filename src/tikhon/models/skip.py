"""Networks with a linear skip connection."""

from __future__ import annotations

from torch import Tensor, nn


class SkipNetwork(nn.Module):
    """A network plus a linear map of its inputs, as `Hierarchical` requires.

    >>> SkipNetwork(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 4, 2)(
    ...     torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.net = net
        self.skip = nn.Linear(features, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (rows, outputs)."""
        return self.net(x) + self.skip(x.flatten(1))
