"""Methods to compare, each a function from a point of the unit cube to a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tikhon.errors import InputError, unknown_name
from tikhon.training.recipe import Recipe
from tikhon.tuning.space import Log, Uniform

_LR = Log(3e-4, 3e-2)


# name -> (range of the strength, the corresponding recipe entries)
_PARTS: dict[str, tuple[Log | Uniform, Callable[[float], dict[str, object]]]] = {
    "none": (Uniform(0, 0), lambda s: {}),
    "l1": (Log(1e-5, 1e-2), lambda s: _penalty("l1", s)),
    "l2": (Log(1e-5, 1e-1), lambda s: _penalty("l2", s)),
    "elastic_net": (Log(1e-5, 3e-2), lambda s: _penalty("elastic_net", s)),
    "group_lasso": (Log(1e-4, 1e-1), lambda s: _penalty("group_lasso", s, rows="in")),
    "mcp": (Log(1e-5, 1e-2), lambda s: _penalty("mcp", s)),
    "auto": (Uniform(0, 0), lambda s: _penalty("l2", "auto", how="decoupled")),
    "dropout": (Uniform(0.05, 0.7), lambda s: {"dropout": s}),
    "early_stopping": (Uniform(2, 12), lambda s: {"early_stopping": round(s)}),
    "label_smoothing": (Uniform(0.02, 0.3), lambda s: {"label_smoothing": s}),
    "mixup": (Uniform(0.05, 1.0), lambda s: {"mixup": s}),
    "input_noise": (Log(0.01, 1.0), lambda s: {"input_noise": s}),
    "ema": (Log(0.9, 0.999), lambda s: {"averaging": "ema", "ema_decay": s}),
}
NAMES = tuple(_PARTS)
DEFAULT = (
    "none",
    "l1",
    "l2",
    "elastic_net",
    "dropout",
    "early_stopping",
    "label_smoothing",
    "mixup",
    "auto",
    "l2+dropout",
    "l1+dropout",
)
_CLASSES_ONLY = ("label_smoothing", "mixup")


def _penalty(name: str, strength: float | str, **more: str) -> dict[str, object]:
    return {"penalties": [{"penalty": name, "strength": strength, "pattern": "*", **more}]}


@dataclass(frozen=True)
class Method:
    """One method, or several joined by "+"."""

    name: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> Method:
        """Parse a name. Raises `InputError` for unknown parts and two proximal penalties.

        >>> Method.of("l2+dropout").parts
        ('l2', 'dropout')
        """
        parts = tuple(part.strip() for part in name.split("+"))
        for part in parts:
            if part not in _PARTS:
                raise InputError(unknown_name("method", part, NAMES))
        if len(set(parts)) < len(parts):
            raise InputError(f"method {name!r} names a part twice")
        return cls(name, parts)

    @property
    def classes_only(self) -> bool:
        """Whether it requires a classification task."""
        return any(part in _CLASSES_ONLY for part in self.parts)

    @property
    def dimensions(self) -> int:
        """Number of tuned values, including the learning rate."""
        return 1 + len(self.parts)

    def recipe(self, units: tuple[float, ...]) -> tuple[Recipe, float]:
        """Return recipe and learning rate at a point of [0, 1)^dimensions.

        >>> Method.of("l2").recipe((0.5, 0.5))[0].to_dict()["penalties"][0]["strength"]
        0.001
        """
        plain: dict[str, Any] = {}
        for part, unit in zip(self.parts, units[1:], strict=True):
            place, make = _PARTS[part]
            found = make(float(f"{place.at(unit):.6g}"))
            found["penalties"] = plain.get("penalties", []) + found.get("penalties", [])
            plain |= found
        return Recipe.from_dict(plain), _LR.at(units[0])


def design(dimensions: int, count: int) -> Iterator[tuple[float, ...]]:
    """Yield `count` points that fill the unit cube evenly, starting at its centre.

    All methods get the same learning rates in the same order: axis i is the additive recurrence
    x_n = 1/2 + n*ratio_i mod 1, with irrational ratios that do not depend on the dimension.
    Reference: Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods", 1992,
    https://doi.org/10.1137/1.9781611970081

    >>> next(design(2, 1))
    (0.5, 0.5)
    """
    phi = 1.618033988749895  # for every number of dimensions: axis i does not depend on it
    ratios = [math.fmod(1 / phi + i * math.sqrt(2) / 3, 1.0) for i in range(dimensions)]
    for n in range(count):
        yield tuple(math.fmod(0.5 + n * ratio, 1.0) for ratio in ratios)
