"""Networks with a piecewise linear basis of each input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ENOUGH = 100_000  # rows used for the quantiles
PARTS = ("source", "left", "width", "mean")  # buffers of a spline
SPREAD = 3.0  # standard deviations at which inputs saturate


class Spline(nn.Module):
    r"""Soft-clipped inputs, and piecewise linear bases between their quantiles.

    An input ``x`` (standardised) gives ``x / sqrt(1 + (x/3)^2)``, and for every two neighbouring
    knots ``a < b``

        2 * (clamp((x - a) / (b - a), 0, 1) - m)        with m the mean of the clamp in training,

    so that a linear layer on top can be any piecewise linear function of each input. Inputs with
    two values (such as category columns) have no pieces.

    Args:
        source, left, width, mean: (pieces,) the input, ``a``, ``b - a`` and ``m`` of each piece.

    Reference: Gorishniy, Rubachev and Babenko, "On embeddings for numerical features in tabular
    deep learning", 2022, https://arxiv.org/abs/2203.05556.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
    >>> Spline.of(x, knots=4)(x).shape
    torch.Size([4, 5])
    """

    source: Tensor
    left: Tensor
    width: Tensor
    mean: Tensor

    def __init__(self, source: Tensor, left: Tensor, width: Tensor, mean: Tensor) -> None:
        super().__init__()
        for name, value in zip(PARTS, (source, left, width, mean)):
            self.register_buffer(name, value)

    @classmethod
    def of(cls, x: Tensor, *, knots: int = 17) -> Spline:
        """Place knots at evenly spaced quantiles of each column of `x`, (rows, ...)."""
        x = x[:: max(1, len(x) // ENOUGH)].flatten(1)
        levels = torch.linspace(0, 1, knots, dtype=x.dtype, device=x.device)
        found = [
            column.quantile(levels, interpolation="nearest").unique() for column in x.unbind(1)
        ]
        found = [edges if len(edges) > 2 else edges[:1] for edges in found]
        counts = torch.tensor([len(edges) - 1 for edges in found], device=x.device)
        source = torch.arange(len(found), device=x.device).repeat_interleave(counts)
        left = torch.cat([edges[:-1] for edges in found])
        width = torch.cat([edges.diff() for edges in found])
        spline = cls(source, left, width, torch.zeros_like(left))
        spline.mean = spline.pieces(x).mean(0) / 2
        return spline

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> Spline:
        """Build the spline from the state of a `SplineNetwork`; RuntimeError for other states."""
        if missing := [f"spline.{name}" for name in PARTS if f"spline.{name}" not in state]:
            raise RuntimeError(f"the state lacks {', '.join(missing)}")
        return cls(*(state[f"spline.{name}"] for name in PARTS))

    def pieces(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., pieces)."""
        share = (x[..., self.source] - self.left) / self.width
        return 2 * (share.clamp(0, 1) - self.mean)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., inputs + pieces)."""
        clipped = x * torch.rsqrt(1 + (x / SPREAD).square())
        return torch.cat([clipped, self.pieces(x)], dim=-1)


class SplineNetwork(nn.Module):
    """A network on top of a `Spline` of its inputs.

    >>> spline = Spline.of(torch.randn(50, 3))
    >>> net = nn.Linear(3 + len(spline.left), 2)
    >>> SplineNetwork(spline, net)(torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """

    def __init__(self, spline: Spline, net: nn.Module) -> None:
        super().__init__()
        self.spline, self.net = spline, net

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (rows, outputs)."""
        return self.net(self.spline(x.flatten(1)))
