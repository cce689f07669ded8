"""Penalties: pure mathematics on one tensor, a value and a prox each."""

from __future__ import annotations

import inspect
import re

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


def penalty_names() -> dict[str, type[Penalty]]:
    """Return every penalty and constraint by its name in recipes and on the command line.

    >>> penalty_names()["group_lasso"].__name__
    'GroupLasso'
    """
    kinds = (globals()[name] for name in __all__ if name[0].isupper())
    return {name_of(kind): kind for kind in kinds if not inspect.isabstract(kind)}


def name_of(kind: type[Penalty]) -> str:
    """Return the name of a penalty: that of its class in snake case.

    >>> name_of(GroupMCP), name_of(L1Ball), name_of(LInf)
    ('group_mcp', 'l1_ball', 'l_inf')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__)
    return words.lower()


def get(name: str, strength: float) -> Penalty:
    """The penalty called `name`, by Keras's names; the strength has no default.

    `"l1_l2"` is `ElasticNet` with equal shares. ValueError for an unknown name.

    >>> get("l1", 1e-4)
    L1(strength=0.0001, weights=None)
    """
    known = {n: kind for n, kind in penalty_names().items() if not kind.constraint}
    known["l1_l2"] = ElasticNet
    if name not in known:
        raise ValueError(unknown_name("penalty", name, known))
    return known[name](strength)
