"""Noise on single entries."""

from __future__ import annotations

from torch import Tensor

from tikhon.layers import functional
from tikhon.layers.noise import NoiseLayer


class Dropout(NoiseLayer):
    """Zero every entry with probability `rate`, scale the rest by 1 / (1 - rate).

    Shapes: any. `rate` is in [0, 1). On the CPU it draws torch's own masks. Raises ValueError for
    a rate out of range. Reference: Srivastava et al. 2014,
    https://jmlr.org/papers/v15/srivastava14a.html

    >>> Dropout(0.5).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__(rate)

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        return functional.dropout(x, self.rate, training=self.training, generator=self.generator)
