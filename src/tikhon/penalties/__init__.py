"""Penalties: pure mathematics on one tensor, a value and a prox each."""

from __future__ import annotations

from tikhon.errors import unknown
from tikhon.penalties.base import Penalty, Proximable
from tikhon.penalties.elementwise import L1, L2, ElasticNet
from tikhon.penalties.group import GroupLasso

__all__ = [
    "L1",
    "L2",
    "ElasticNet",
    "GroupLasso",
    "Penalty",
    "Proximable",
    "get",
]

_BY_NAME: dict[str, type[Penalty]] = {
    "l1": L1,
    "l2": L2,
    "l1_l2": ElasticNet,
    "elastic_net": ElasticNet,
    "group_lasso": GroupLasso,
}


def get(name: str, strength: float) -> Penalty:
    """The penalty of that name, as users of Keras write it; the strength has no default.

    `"l1_l2"` is `ElasticNet` with equal shares. ValueError for an unknown name.

    >>> get("l1", 1e-4)
    L1(strength=0.0001, weights=None)
    """
    if name not in _BY_NAME:
        raise ValueError(unknown("penalty", name, _BY_NAME))
    return _BY_NAME[name](strength)
