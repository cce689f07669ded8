"""A penalty as a function of a linear model's weights W (outputs, features)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from tikhon.errors import InputError, described
from tikhon.penalties import (
    L1,
    ElasticNet,
    Hierarchical,
    NuclearNorm,
    Penalty,
    Proximable,
    SpectralNorm,
    TotalVariation,
)
from tikhon.penalties.optimality import max_strength

Layout = Literal["entries", "features", "matrix", "whole"]
_MATRIX = (TotalVariation, NuclearNorm, SpectralNorm)


def followed(penalty: Penalty) -> Proximable:
    """The penalty itself, if a path can follow it; otherwise `InputError`, by name."""
    if not isinstance(penalty, Penalty):
        raise InputError(f"penalty must be a penalty, such as L1(), received {described(penalty)}")
    name = type(penalty).__name__
    if penalty.constraint:
        raise InputError(
            f"{name} is a constraint: it has no strength to follow; a path needs a penalty whose "
            "prox gives zeros, such as L1 (positive=True keeps its weights >= 0)"
        )
    if penalty.smooth or not isinstance(penalty, Proximable):
        raise InputError(
            f"{name} gives no zeros at any strength: a path needs a penalty whose prox gives "
            "zeros, such as L1, not L2, Huber or Orthogonal"
        )
    return penalty


@dataclass(frozen=True, eq=False)
class FeaturePenalty:
    """A penalty that reads W in its own layout, with W >= 0 as a constraint if `positive`.

    entries: W as it is, a sum over entries. features: W', one row a feature, so that a group is
    what a feature needs (GroupLasso, SparseGroupLasso, GroupMCP, LInf). matrix: W as it is, one
    row an output (TotalVariation along the features, NuclearNorm, SpectralNorm). whole: all
    entries as one row (SLOPE).
    """

    penalty: Proximable
    layout: Layout
    positive: bool = False

    @classmethod
    def of(
        cls,
        penalty: Penalty,
        outputs: int,
        features: int,
        *,
        positive: bool = False,
        name: str = "weight",
    ) -> Self:
        """Bound to a weight of this shape (and `name`, where factors are given by name).

        Raises `InputError` for what a linear path cannot solve, by name.
        """
        penalty = followed(penalty)
        kind = type(penalty).__name__
        if isinstance(penalty, Hierarchical):
            raise InputError(
                "Hierarchical ties the first layer of a network to its skip connection, which a "
                "linear model does not have: give build_model, or use L1"
            )
        layout = _layout(penalty)
        if positive and layout == "matrix":
            raise InputError(f"positive=True is not solved together with {kind}; use L1 or SLOPE")
        try:
            bound = penalty.for_parameter(name, torch.Size([outputs, features]))
        except ValueError as error:
            raise InputError(str(error)) from error
        factors = getattr(bound, "weights", None)
        if isinstance(factors, Tensor):
            if layout == "features" and factors.numel() != features:
                raise InputError(
                    f"{kind}: weights must have one factor for each of the {features} features, "
                    f"received shape {tuple(factors.shape)}"
                )
            if layout == "whole" and factors.shape != (outputs * features,):
                raise InputError(
                    f"{kind}: weights must have {outputs * features} entries, received shape "
                    f"{tuple(factors.shape)}"
                )
            factors = factors.reshape(-1) if layout == "features" else factors
            bound = replace(bound, weights=factors.double())
        return cls(bound, layout, positive)

    @property
    def name(self) -> str:
        """The penalty's class."""
        return type(self.penalty).__name__

    @property
    def separable(self) -> bool:
        """Whether features that are zero can be left out of the sum."""
        return self.layout in ("entries", "features")

    @property
    def diagonal(self) -> bool:
        """Whether each feature may have a step of its own."""
        return self.separable and self.penalty.diagonal

    def at(self, strength: float) -> Self:
        """The same at another strength."""
        return replace(self, penalty=self.penalty.with_strength(strength))

    def kinks(self, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Thresholds and ridges of L1 and ElasticNet, in W's shape; None of other penalties."""
        penalty = self.penalty
        if not isinstance(penalty, L1 | ElasticNet):
            return None
        share = penalty.l1_ratio if isinstance(penalty, ElasticNet) else 1.0
        factors = getattr(penalty, "weights", None)
        factors = torch.ones(shape, dtype=torch.float64) if factors is None else factors
        whole = float(penalty.strength) * factors.expand(shape)
        return share * whole, (1 - share) * whole

    def only(self, columns: Tensor) -> Self:
        """The penalty of some of the features (indices); for a separable one."""
        factors = getattr(self.penalty, "weights", None)
        if factors is None:
            return self
        return replace(self, penalty=replace(self.penalty, weights=factors[..., columns]))

    def unpenalised(self, shape: torch.Size) -> Tensor:
        """Bool mask of W: the entries whose factor is 0."""
        factors = getattr(self.penalty, "weights", None)
        if factors is None or not self.separable:
            return torch.zeros(shape, dtype=torch.bool)
        return (factors == 0).expand(shape)

    def value(self, weight: Tensor) -> Tensor:
        """0-d value."""
        return self.penalty.value(self._view(weight))

    def grad(self, weight: Tensor) -> Tensor:
        """Gradient in W's shape."""
        return self._unview(self.penalty.grad(self._view(weight)), weight)

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        """The prox in W's shape; `step` is a number or, if `diagonal`, (features,).

        A penalty that grows with the sizes of the entries keeps their signs, so under W >= 0 its
        prox is that of the positive part.
        """
        weight = weight.clamp_min(0) if self.positive else weight
        if isinstance(step, Tensor):
            step = self._view(step.expand(weight.shape))
        return self._unview(self.penalty.prox(self._view(weight), step), weight)

    def max_strength(self, gradient: Tensor, step: float) -> float:
        """The smallest strength at which a step from the model without features stays there."""
        pull = gradient.clamp_max(0) if self.positive else gradient
        try:
            return float(max_strength(self.penalty, self._view(pull), step=step))
        except ValueError as error:
            raise InputError(f"{error}: strengths=[0.1, 0.01]") from error

    def _view(self, weight: Tensor) -> Tensor:
        if self.layout == "features":
            return weight.T
        return weight.reshape(1, -1) if self.layout == "whole" else weight

    def _unview(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows.T if self.layout == "features" else rows.reshape(weight.shape)


def _layout(penalty: Proximable) -> Layout:
    if penalty.elementwise:
        return "entries"
    if isinstance(penalty, _MATRIX):
        return "matrix"
    return "whole" if penalty.rows == "tensor" else "features"
