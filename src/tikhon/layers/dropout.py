"""Noise on single entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from tikhon.arguments import check_number
from tikhon.errors import describe
from tikhon.layers import functional
from tikhon.layers.masks import check_dims, check_rank
from tikhon.layers.noise import NoiseLayer, TorchDropout


class Dropout(TorchDropout):
    """Zero every entry with probability `rate`, scale the rest by 1 / (1 - rate).

    Shapes: any. `rate` is in [0, 1]. The mask is constant along the `tied` dimensions. On the CPU
    and without `tied` it draws torch's own masks. Raises ValueError for a rate out of range.
    Reference: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html

    >>> Dropout(0.5).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    _function = functional.dropout
    _options = ("tied",)

    tied: tuple[int, ...]

    def __init__(
        self,
        rate: float = 0.5,
        inplace: bool = False,
        *,
        p: float | None = None,
        tied: Sequence[int] = (),
    ) -> None:
        super().__init__(rate, inplace, p=p)
        several = hasattr(tied, "__len__") and getattr(tied, "ndim", 1)
        if isinstance(tied, str | bytes) or not several:
            raise TypeError(f"{self.label}: tied takes dimensions, received {describe(tied)}")
        self.tied = tuple(
            check_number(
                self.label, "an entry of tied", d, "a dimension", math.isfinite, whole=True
            )
            for d in tied
        )
        self.rowwise: bool = 0 not in self.tied

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        check_dims(x, self.tied, self)
        return super().forward(x)


class AlphaDropout(TorchDropout):
    """Dropout for SELU networks: dropped entries take SELU's floor, mean and variance are kept.

    Shapes: any. `rate` is in [0, 1]. Raises ValueError for a rate out of range.
    Reference: Klambauer et al. 2017, https://arxiv.org/abs/1706.02515

    >>> AlphaDropout(0.1).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    _function = functional.alpha_dropout
    writes_input = False


class FeatureAlphaDropout(TorchDropout):
    """Alpha dropout of whole channels.

    Shapes: (N, C, ...). `rate` is in [0, 1]. Raises ValueError for a rate out of range or an input
    without channels. Reference: Klambauer et al. 2017, https://arxiv.org/abs/1706.02515

    >>> FeatureAlphaDropout(0.1).eval()(torch.ones(1, 2))
    tensor([[1., 1.]])
    """

    _function = functional.feature_alpha_dropout
    writes_input = False

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        check_rank(x, range(2, 65), self, "(N, C, ...)")
        return super().forward(x)


class GaussianDropout(NoiseLayer):
    """Multiply by normal noise of mean 1 and variance rate / (1 - rate), the variance of dropout.

    Shapes: any. `rate` is in [0, 1]. Raises ValueError for a rate out of range.
    Reference: Srivastava et al. 2014, section 10, https://jmlr.org/papers/v15/srivastava14a.html

    >>> GaussianDropout(0.5).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    _function = functional.gaussian_dropout


class GaussianNoise(NoiseLayer):
    """Add normal noise whose standard deviation is `rate`.

    Shapes: any. `rate` is finite and >= 0, in the units of the input. Raises ValueError otherwise.
    Reference: Bishop 1995, https://doi.org/10.1162/neco.1995.7.1.108

    >>> GaussianNoise(0.1).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    _function = functional.gaussian_noise
    upper: ClassVar[float] = math.inf

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(rate)
