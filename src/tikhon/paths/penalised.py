"""Penalties as functions of a linear model's weights W (outputs, features)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from tikhon.errors import InputError, describe
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


def check_path_penalty(penalty: Penalty) -> Proximable:
    """Return the penalty if a path supports it, else raise `InputError`."""
    if not isinstance(penalty, Penalty):
        raise InputError(f"penalty must be a penalty, such as L1(), received {describe(penalty)}")
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
    """A penalty applied to W in its own layout, with W >= 0 if `positive`.

    Layouts: "entries" is W itself, for elementwise penalties; "features" is W', with a row for
    each feature (GroupLasso, SparseGroupLasso, GroupMCP, LInf); "matrix" is W, with a row for each
    output (TotalVariation over features, NuclearNorm, SpectralNorm); "whole" is all entries as one
    row (SLOPE).
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
        """Bind to a weight of this shape (and `name`, where factors are given by name).

        Raises `InputError` for a penalty that a linear path does not support.
        """
        penalty = check_path_penalty(penalty)
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
        """Name of the penalty's class."""
        return type(self.penalty).__name__

    @property
    def separable(self) -> bool:
        """Whether zero features can be left out of the sum."""
        return self.layout in ("entries", "features")

    @property
    def diagonal(self) -> bool:
        """Whether each feature may have its own step."""
        return self.separable and self.penalty.diagonal

    def at(self, strength: float) -> Self:
        """Return the penalty at another strength."""
        return replace(self, penalty=self.penalty.with_strength(strength))

    def thresholds_and_ridges(self, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Return thresholds and ridges of L1 and ElasticNet in W's shape, None for others."""
        penalty = self.penalty
        if not isinstance(penalty, L1 | ElasticNet):
            return None
        share = penalty.l1_ratio if isinstance(penalty, ElasticNet) else 1.0
        factors = getattr(penalty, "weights", None)
        factors = torch.ones(shape, dtype=torch.float64) if factors is None else factors
        scale = float(penalty.strength) * factors.expand(shape)
        return share * scale, (1 - share) * scale

    def only(self, columns: Tensor) -> Self:
        """Return a separable penalty restricted to some features (indices)."""
        factors = getattr(self.penalty, "weights", None)
        if factors is None:
            return self
        return replace(self, penalty=replace(self.penalty, weights=factors[..., columns]))

    def unpenalised(self, shape: torch.Size) -> Tensor:
        """Return a bool mask of W: entries with factor 0."""
        factors = getattr(self.penalty, "weights", None)
        if factors is None or not self.separable:
            return torch.zeros(shape, dtype=torch.bool)
        return (factors == 0).expand(shape)

    def value(self, weight: Tensor) -> Tensor:
        """Return the value, 0-d."""
        return self.penalty.value(self._to_layout(weight))

    def grad(self, weight: Tensor) -> Tensor:
        """Return the gradient in W's shape."""
        return self._from_layout(self.penalty.grad(self._to_layout(weight)), weight)

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        """Return the prox in W's shape; `step` is a number or, if `diagonal`, (features,).

        As the penalty is increasing in the absolute entries, its prox preserves signs, so under W
        >= 0 it is the prox of the positive part.
        """
        weight = weight.clamp_min(0) if self.positive else weight
        if isinstance(step, Tensor):
            step = self._to_layout(step.expand(weight.shape))
        return self._from_layout(self.penalty.prox(self._to_layout(weight), step), weight)

    def max_strength(self, gradient: Tensor, step: float) -> float:
        """Smallest strength at which a step from the empty model stays there."""
        descent = gradient.clamp_max(0) if self.positive else gradient
        try:
            return float(max_strength(self.penalty, self._to_layout(descent), step=step))
        except ValueError as error:
            raise InputError(f"{error}: strengths=[0.1, 0.01]") from error

    def _to_layout(self, weight: Tensor) -> Tensor:
        if self.layout == "features":
            return weight.T
        return weight.reshape(1, -1) if self.layout == "whole" else weight

    def _from_layout(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows.T if self.layout == "features" else rows.reshape(weight.shape)


def _layout(penalty: Proximable) -> Layout:
    if penalty.elementwise:
        return "entries"
    if isinstance(penalty, _MATRIX):
        return "matrix"
    return "whole" if penalty.rows == "tensor" else "features"
