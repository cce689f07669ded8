"""Penalties that are sums over entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.errors import describe
from tikhon.penalties.base import Proximable, Slopes, as_tensor, keep_nonfinite, upcast, weighted


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
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping from
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

    def value(self, w: Tensor) -> Tensor:
        """strength * sum(weights * |w|)."""
        return self.lam * weighted(upcast(w).abs(), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * sign(w), 0 at 0."""
        return weighted(self.lam * torch.sgn(w), self.weights).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * weights, on entries."""
        return Slopes(entries=weighted(self.lam, self.weights))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Soft threshold at step * strength * weights."""
        return soft_threshold(w, weighted(self.lam * step, self.weights))


@dataclass(frozen=True, eq=False)
class L2(Proximable):
    """Weight decay: the square of the Euclidean norm, halved.

    `strength/2 * sum(weights * |w - center|^2)`: the gradient is `strength * w`, so `strength`
    means what `weight_decay` means in torch.

    Args:
        center: the point that weights are pulled towards (default 0): a tensor of w's shape, or a
            mapping from parameter names to tensors, such as the `state_dict` of the model that is
            fine-tuned (L2-SP).
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        named = self.center if isinstance(self.center, Mapping) else {"": self.center}
        for name, point in named.items():
            where = f" for {name!r}" if name else ""
            if point is not None and not isinstance(point, Tensor):
                raise TypeError(
                    f"L2: center{where} must be a tensor or a mapping from parameter names to "
                    f"tensors, received {describe(point)}"
                )

    def value(self, w: Tensor) -> Tensor:
        """strength/2 * sum(weights * |w - center|^2)."""
        return self.lam / 2 * weighted(self._offset(upcast(w)).abs().square(), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * (w - center)."""
        return weighted(self.lam * self._offset(w), self.weights).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """center + (w - center) / (1 + step * strength * weights)."""
        shrunk = self._offset(w) / (1 + weighted(self.lam * step, self.weights))
        return (shrunk if self.center is None else self.center + shrunk).to(w.dtype)

    def _offset(self, w: Tensor) -> Tensor:
        if isinstance(self.center, Mapping):
            raise TypeError("center is given by parameter name; choose with for_parameter(name)")
        return w if self.center is None else w - self.center


@dataclass(frozen=True, eq=False)
class ElasticNet(Proximable):
    """The sum of L1 and L2: exact zeros that keep correlated weights together.

    `strength * sum(weights * (l1_ratio * |w| + (1 - l1_ratio)/2 * |w|^2))`.

    Args:
        l1_ratio: share of the L1 part, in [0, 1].
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping.

    Reference: Zou and Hastie (2005), https://doi.org/10.1111/j.1467-9868.2005.00503.x.

    >>> ElasticNet(1.0, l1_ratio=0.5).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1., 0.])
    """

    l1_ratio: float = 0.5
    weights: Tensor | Mapping[str, Tensor] | None = None

    elementwise: ClassVar[bool] = True
    shares: ClassVar[tuple[str, ...]] = ("l1_ratio",)

    def value(self, w: Tensor) -> Tensor:
        """strength * sum(weights * (l1_ratio * |w| + (1 - l1_ratio)/2 * |w|^2))."""
        size = upcast(w).abs()
        entries = self.l1_ratio * size + (1 - self.l1_ratio) / 2 * size.square()
        return self.lam * weighted(entries, self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * (l1_ratio * sign(w) + (1 - l1_ratio) * w)."""
        entries = self.l1_ratio * torch.sgn(w) + (1 - self.l1_ratio) * w
        return weighted(self.lam * entries, self.weights).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * l1_ratio * weights, on entries."""
        return Slopes(entries=weighted(self.lam * self.l1_ratio, self.weights))

    def steepness(self, w: Tensor) -> float | Tensor:
        """strength * weights, up to a size of 1."""
        return weighted(self.lam, self.weights)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Soft threshold, then division by 1 + step * strength * (1 - l1_ratio) * weights."""
        scale = weighted(self.lam * step, self.weights)
        shrunk = soft_threshold(w, self.l1_ratio * scale)
        return (shrunk / (1 + (1 - self.l1_ratio) * scale)).to(w.dtype)


@dataclass(frozen=True, eq=False)
class Huber(Proximable):
    """Quadratic near zero, linear far from it: large weights are pulled less than by L2.

    `strength * sum(weights * h(w))`, with h(w) = w^2/2 for |w| <= delta and
    delta * (|w| - delta/2) beyond.

    Args:
        delta: where the quadratic part ends and the linear one begins, > 0.
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping.

    Reference: Huber (1964), https://doi.org/10.1214/aoms/1177703732.

    >>> Huber(1.0, delta=1.0).value(torch.tensor([0.5, 3.0]))
    tensor(2.6250)
    """

    delta: float = 1.0
    weights: Tensor | Mapping[str, Tensor] | None = None

    smooth: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    above: ClassVar[dict[str, float]] = {"delta": 0}

    def value(self, w: Tensor) -> Tensor:
        """strength * sum(weights * h(w))."""
        size = upcast(w).abs()
        near = size.clamp(max=self.delta)
        return self.lam * weighted(near * (size - near / 2), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * w, w clipped at delta."""
        clipped = torch.sgn(w) * w.abs().clamp(max=self.delta)
        return weighted(self.lam * clipped, self.weights).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Shrunk like L2 where the result stays within delta, moved by a constant beyond."""
        scale = weighted(self.lam * step, self.weights)
        near = w / (1 + scale)
        moved = w - self.delta * scale * torch.sgn(w)
        return torch.where(near.abs() <= self.delta, near, moved).to(w.dtype)


@dataclass(frozen=True, eq=False)
class MCP(Proximable):
    """Minimax concave penalty: exact zeros like L1, and no shrinkage of large weights.

    Sum over entries of `strength*|w| - w^2/(2*gamma)` up to |w| = gamma*strength, the constant
    `gamma*strength^2/2` beyond, times the entry's weight.

    Args:
        strength: lambda >= 0, the threshold at which weights become zero.
        gamma: concavity, > 0; large values approach L1, small values a hard threshold.
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping.

    Reference: Zhang (2010), https://doi.org/10.1214/09-AOS729.

    >>> MCP(1.0, gamma=3.0).prox(torch.tensor([0.5, 2.0, 4.0]), step=1.0)
    tensor([0.0000, 1.5000, 4.0000])
    """

    gamma: float = 3.0
    weights: Tensor | Mapping[str, Tensor] | None = None

    convex: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    above: ClassVar[dict[str, float]] = {"gamma": 0}

    def value(self, w: Tensor) -> Tensor:
        """Sum of the concave quadratic up to gamma*strength, constant beyond."""
        return weighted(mcp_value(upcast(w).abs(), self.lam, self.gamma), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """weights * sign(w) * max(strength - |w|/gamma, 0)."""
        slope = (self.lam - w.abs() / self.gamma).clamp_min(0)
        return weighted(torch.sgn(w) * slope, self.weights).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * weights, on entries."""
        return Slopes(entries=weighted(self.lam, self.weights))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Firm threshold for step < gamma, hard threshold at strength*sqrt(step*gamma) else."""
        size = upcast(w).abs()
        step = as_tensor(weighted(step, self.weights), size)
        shrunk = mcp_prox(size, step, self.lam, self.gamma)
        return (torch.sgn(w) * shrunk).to(w.dtype)


def mcp_value(size: Tensor, strength: float | Tensor, gamma: float) -> Tensor:
    """The minimax concave penalty of each size >= 0."""
    near = torch.minimum(size, as_tensor(gamma * strength, size))
    return strength * near - near.square() / (2 * gamma)


def mcp_prox(size: Tensor, step: Tensor, strength: float | Tensor, gamma: float) -> Tensor:
    """The prox of MCP for each size >= 0."""
    firm = step < gamma
    slope = torch.where(firm, 1 - step / gamma, 1)
    inner = (size - step * strength).clamp_min(0) / slope
    soft = torch.where(size <= gamma * strength, inner, size)
    hard = torch.where(size <= strength * (step * gamma).sqrt(), 0, size)  # NaN stays
    return torch.where(firm, soft, hard)


@dataclass(frozen=True, eq=False)
class SCAD(Proximable):
    """Smoothly clipped absolute deviation: L1 near zero, no shrinkage of large weights.

    Sum over entries of `strength*|w|` up to |w| = strength, `(2*a*strength*|w| - w^2 -
    strength^2) / (2*(a - 1))` up to a*strength, the constant `strength^2 * (a + 1)/2` beyond,
    times the entry's weight.

    Args:
        strength: lambda >= 0, the threshold at which weights become zero.
        a: the penalty is constant beyond a*strength, > 2.
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping.

    Reference: Fan and Li (2001), https://doi.org/10.1198/016214501753382273.

    >>> SCAD(1.0, a=3.7).prox(torch.tensor([0.5, 1.5, 4.0]), step=1.0)
    tensor([0.0000, 0.5000, 4.0000])
    """

    a: float = 3.7
    weights: Tensor | Mapping[str, Tensor] | None = None

    convex: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    above: ClassVar[dict[str, float]] = {"a": 2}

    def value(self, w: Tensor) -> Tensor:
        """Sum of the three pieces."""
        return weighted(self._pieces(upcast(w).abs()), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """weights * sign(w) * (a*strength - |w|)/(a - 1), the slope clipped to [0, strength]."""
        slope = ((self.a * self.lam - w.abs()) / (self.a - 1)).clamp_min(0)
        slope = torch.minimum(slope, as_tensor(self.lam, slope))
        return weighted(torch.sgn(w) * slope, self.weights).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * weights, on entries."""
        return Slopes(entries=weighted(self.lam, self.weights))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Three pieces for step < a - 1; else the better of the two outer pieces."""
        size, lam, a = upcast(w).abs(), self.lam, self.a
        step = as_tensor(weighted(step, self.weights), size)
        convex = step < a - 1
        near = (size - step * lam).clamp_min(0)
        middle = ((a - 1) * size - step * a * lam) / torch.where(convex, a - 1 - step, 1)
        inner = torch.where(size <= lam * (1 + step), near, middle)
        pieces = torch.where(size <= a * lam, inner, size)
        low = torch.minimum(near, as_tensor(lam, size))
        high = torch.maximum(size, as_tensor(a * lam, size))
        worse = self._objective(low, size, step) > self._objective(high, size, step)
        left = torch.sgn(w) * torch.where(convex, pieces, torch.where(worse, high, low))
        return keep_nonfinite(left.to(w.dtype), w)

    def _pieces(self, size: Tensor) -> Tensor:
        lam, a = self.lam, self.a
        near = torch.minimum(size, as_tensor(lam, size))
        middle = torch.minimum(size, as_tensor(a * lam, size)) - near
        return lam * near + middle * (lam - middle / (2 * (a - 1)))

    def _objective(self, candidate: Tensor, size: Tensor, step: Tensor) -> Tensor:
        return (candidate - size).square() / 2 + step * self._pieces(candidate)


@dataclass(frozen=True, eq=False)
class LogSum(Proximable):
    """Logarithm of the absolute values: between L1 and counting the non-zeros.

    `strength * sum(weights * log(1 + |w|/epsilon))`.

    Args:
        epsilon: the size above which shrinking fades, > 0.
        weights: factors >= 0, a tensor that broadcasts to w, or a mapping.

    Reference: Candes, Wakin and Boyd (2008), https://doi.org/10.1007/s00041-008-9045-x.

    >>> LogSum(0.1, epsilon=0.5).prox(torch.tensor([0.1, 2.0]), step=1.0)
    tensor([0.0000, 1.9593])
    """

    epsilon: float = 0.1
    weights: Tensor | Mapping[str, Tensor] | None = None

    convex: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    above: ClassVar[dict[str, float]] = {"epsilon": 0}

    def value(self, w: Tensor) -> Tensor:
        """strength * sum(weights * log(1 + |w|/epsilon))."""
        return self.lam * weighted(torch.log1p(upcast(w).abs() / self.epsilon), self.weights).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * sign(w) / (epsilon + |w|)."""
        slope = self.lam * torch.sgn(w) / (self.epsilon + w.abs())
        return weighted(slope, self.weights).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * weights / epsilon, on entries."""
        return Slopes(entries=weighted(self.lam / self.epsilon, self.weights))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Larger root of a quadratic; zero instead where that is better or there is no root."""
        size, epsilon = upcast(w).abs(), self.epsilon
        scale = as_tensor(weighted(self.lam * step, self.weights), size)
        discriminant = (size + epsilon).square() - 4 * scale
        root = ((size - epsilon + discriminant.clamp_min(0).sqrt()) / 2).clamp_min(0)
        cost = (root - size).square() / 2 + scale * torch.log1p(root / epsilon)
        # up to scale = epsilon^2 the objective is convex: comparing costs would only add noise
        keep = (discriminant >= 0) & ((scale <= epsilon**2) | (cost < size.square() / 2))
        return keep_nonfinite((torch.sgn(w) * torch.where(keep, root, 0)).to(w.dtype), w)
