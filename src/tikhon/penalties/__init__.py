"""Penalties: pure mathematics on one tensor, a value and a prox each."""

from __future__ import annotations

from tikhon.errors import unknown_name
from tikhon.penalties.base import Penalty, Proximable
from tikhon.penalties.constraints import (
    Box,
    Constraint,
    L1Ball,
    L2Ball,
    MaxNorm,
    MinMaxNorm,
    NonNegative,
    Simplex,
    SpectralBall,
    TopK,
    UnitNorm,
)
from tikhon.penalties.elementwise import L1, L2, MCP, SCAD, ElasticNet, Huber, LogSum
from tikhon.penalties.group import GroupLasso, GroupMCP, LInf, SparseGroupLasso
from tikhon.penalties.hierarchical import Hierarchical
from tikhon.penalties.matrix import NuclearNorm, Orthogonal, SpectralNorm
from tikhon.penalties.optimality import max_strength, moreau_envelope, residual
from tikhon.penalties.ordered import SLOPE, TotalVariation

__all__ = [
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "SLOPE",
    "Box",
    "Constraint",
    "ElasticNet",
    "GroupLasso",
    "GroupMCP",
    "Hierarchical",
    "Huber",
    "L1Ball",
    "L2Ball",
    "LInf",
    "LogSum",
    "MaxNorm",
    "MinMaxNorm",
    "NonNegative",
    "NuclearNorm",
    "Orthogonal",
    "Penalty",
    "Proximable",
    "Simplex",
    "SparseGroupLasso",
    "SpectralBall",
    "SpectralNorm",
    "TopK",
    "TotalVariation",
    "UnitNorm",
    "get",
    "max_strength",
    "moreau_envelope",
    "residual",
]

_BY_NAME: dict[str, type[Penalty]] = {
    "l1": L1,
    "l2": L2,
    "l1_l2": ElasticNet,
    "elastic_net": ElasticNet,
    "huber": Huber,
    "mcp": MCP,
    "scad": SCAD,
    "log_sum": LogSum,
    "group_lasso": GroupLasso,
    "sparse_group_lasso": SparseGroupLasso,
    "group_mcp": GroupMCP,
    "l_inf": LInf,
    "nuclear_norm": NuclearNorm,
    "spectral_norm": SpectralNorm,
    "orthogonal": Orthogonal,
    "slope": SLOPE,
    "total_variation": TotalVariation,
    "hierarchical": Hierarchical,
}


def get(name: str, strength: float) -> Penalty:
    """The penalty called `name`, by Keras's names; the strength has no default.

    `"l1_l2"` is `ElasticNet` with equal shares. ValueError for an unknown name.

    >>> get("l1", 1e-4)
    L1(strength=0.0001, weights=None)
    """
    if name not in _BY_NAME:
        raise ValueError(unknown_name("penalty", name, _BY_NAME))
    return _BY_NAME[name](strength)
