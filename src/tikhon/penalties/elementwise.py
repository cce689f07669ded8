"""Penalties that are sums over entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.penalties.base import Proximable, check_ratio, weighted, wide


def soft_threshold(w: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(w) max(|w| - threshold, 0), entrywise; for complex entries on the modulus.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])
    """
    if w.is_complex():
        return torch.sgn(w) * (w.abs() - threshold).clamp_min(0)
    if isinstance(threshold, Tensor):
        return (w - w.clamp(-threshold, threshold)).to(w.dtype)
    return w - w.clamp(-threshold, threshold)


@dataclass(frozen=True, eq=False)
class L1(Proximable):
    """The lasso: exact zeros in single weights.

    `strength * sum(weights * |w|)`, with weights 1 unless given.

    Args:
        strength: lambda >= 0.
        weights: factors >= 0 (not checked), a tensor that broadcasts to w, or a mapping from
            parameter names to such tensors: the adaptive lasso.

    Reference: Tibshirani (1996), https://doi.org/10.1111/j.2517-6161.1996.tb02080.x; weights:
    Zou (2006), https://doi.org/10.1198/016214506000000735.

    >>> w = torch.tensor([3.0, -0.5, 0.0])
    >>> L1(0.1).value(w)
    tensor(0.3500)
    >>> L1(1.0).prox(w, step=1.0)
    tensor([2., 0., 0.])
    """

    weights: Tensor | Mapping[str, Tensor] | None = None

    elementwise: ClassVar[bool] = True
    reference: ClassVar[str] = "Tibshirani 1996"

    def value(self, w: Tensor) -> Tensor:
        """strength * sum(weights * |w|)."""
        return self.lam * weighted(wide(w).abs(), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * sign(w), 0 at 0."""
        return weighted(self.lam * torch.sgn(w), self.weights).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Soft threshold at step * strength * weights."""
        return soft_threshold(w, weighted(self.lam * step, self.weights))


@dataclass(frozen=True, eq=False)
class L2(Proximable):
    """Weight decay: the square of the Euclidean norm, halved.

    `strength/2 * sum(weights * |w - center|^2)`: the gradient is `strength * w`, so `strength`
    means what `weight_decay` means in torch.

    Args:
        strength: lambda >= 0.
        center: the point that weights are drawn to, 0 unless given: a tensor of w's shape, or a
            mapping from parameter names to tensors, such as the `state_dict` of the model that is
            fine-tuned (L2-SP).
        weights: factors >= 0 (not checked), a tensor that broadcasts to w, or a mapping.

    Reference: Hoerl and Kennard (1970), https://doi.org/10.1080/00401706.1970.10488634; center:
    Li, Grandvalet and Davoine (2018), https://arxiv.org/abs/1802.01483.

    >>> w = torch.tensor([3.0, -4.0])
    >>> L2(0.1).value(w)
    tensor(1.2500)
    >>> L2(0.1, center=torch.tensor([1.0, -4.0])).grad(w)
    tensor([0.2000, 0.0000])
    """

    center: Tensor | Mapping[str, Tensor] | None = None
    weights: Tensor | Mapping[str, Tensor] | None = None

    smooth: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    reference: ClassVar[str] = "Hoerl and Kennard 1970"

    def value(self, w: Tensor) -> Tensor:
        """strength/2 * sum(weights * |w - center|^2)."""
        return self.lam / 2 * weighted(self._offset(wide(w)).abs().square(), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * (w - center)."""
        return weighted(self.lam * self._offset(w), self.weights).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """center + (w - center) / (1 + step * strength * weights)."""
        shrunk = self._offset(w) / (1 + weighted(self.lam * step, self.weights))
        return (shrunk if self.center is None else self.center + shrunk).to(w.dtype)

    def _offset(self, w: Tensor) -> Tensor:
        return w if self.center is None else w - self.center  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class ElasticNet(Proximable):
    """The sum of L1 and L2: exact zeros that keep correlated weights together.

    `strength * sum(weights * (l1_ratio * |w| + (1 - l1_ratio)/2 * |w|^2))`.

    Args:
        strength: lambda >= 0.
        l1_ratio: share of the L1 part, in [0, 1].
        weights: factors >= 0 (not checked), a tensor that broadcasts to w, or a mapping.

    Reference: Zou and Hastie (2005), https://doi.org/10.1111/j.1467-9868.2005.00503.x.

    >>> ElasticNet(1.0, l1_ratio=0.5).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1., 0.])
    """

    l1_ratio: float = 0.5
    weights: Tensor | Mapping[str, Tensor] | None = None

    elementwise: ClassVar[bool] = True
    reference: ClassVar[str] = "Zou and Hastie 2005"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.l1_ratio, self)

    def value(self, w: Tensor) -> Tensor:
        """strength * sum(weights * (l1_ratio * |w| + (1 - l1_ratio)/2 * |w|^2))."""
        size = wide(w).abs()
        entries = self.l1_ratio * size + (1 - self.l1_ratio) / 2 * size.square()
        return self.lam * weighted(entries, self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * (l1_ratio * sign(w) + (1 - l1_ratio) * w)."""
        entries = self.l1_ratio * torch.sgn(w) + (1 - self.l1_ratio) * w
        return weighted(self.lam * entries, self.weights).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Soft threshold, then division by 1 + step * strength * (1 - l1_ratio) * weights."""
        scale = weighted(self.lam * step, self.weights)
        shrunk = soft_threshold(w, self.l1_ratio * scale)
        return (shrunk / (1 + (1 - self.l1_ratio) * scale)).to(w.dtype)
