"""tikhon: regularization of PyTorch models, attached, audited, tuned and diagnosed.

`import tikhon` loads nothing heavy: a name imports its module when it is first used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> module that defines it; "" marks a submodule that is itself public
_PUBLIC = {
    # verbs
    "regularize": "tikhon.regularizer.regularizer",
    "compact": "tikhon.compaction",
    "sparsify": "tikhon.sparsity",
    "fit": "tikhon.training",
    "Recipe": "tikhon.training.recipe",
    "tune": "tikhon.tuning.tune",
    "path": "tikhon.paths.path",
    "stability": "tikhon.paths.stability",
    "diagnose": "tikhon.diagnosis",
    "watch": "tikhon.monitoring",
    "NonFiniteError": "tikhon.monitoring",
    "cure": "tikhon.cures",
    # what goes where
    "Term": "tikhon.regularizer.terms",
    "select": "tikhon.regularizer.targets",
    "audit": "tikhon.regularizer.audit",
    "register_gain": "tikhon.regularizer.metric",
    # strengths
    "Hypergradient": "tikhon.strengths.hypergradient",
    "LossWeight": "tikhon.strengths.loss_weight",
    "implicit_slopes": "tikhon.strengths.implicit",
    "TargetSparsity": "tikhon.strengths.sparsity",
    "NormBound": "tikhon.strengths.norm_bound",
    "schedules": "tikhon.strengths",
    # what varies
    "Space": "tikhon.tuning.space",
    "Uniform": "tikhon.tuning.space",
    "Int": "tikhon.tuning.space",
    "Log": "tikhon.tuning.space",
    "Choice": "tikhon.tuning.space",
    # penalties
    "Penalty": "tikhon.penalties",
    "Proximable": "tikhon.penalties",
    "L1": "tikhon.penalties",
    "L2": "tikhon.penalties",
    "MCP": "tikhon.penalties",
    "SCAD": "tikhon.penalties",
    "SLOPE": "tikhon.penalties",
    "Box": "tikhon.penalties",
    "ElasticNet": "tikhon.penalties",
    "GroupLasso": "tikhon.penalties",
    "GroupMCP": "tikhon.penalties",
    "Hierarchical": "tikhon.penalties",
    "Huber": "tikhon.penalties",
    "L1Ball": "tikhon.penalties",
    "L2Ball": "tikhon.penalties",
    "LInf": "tikhon.penalties",
    "LogSum": "tikhon.penalties",
    "MaxNorm": "tikhon.penalties",
    "MinMaxNorm": "tikhon.penalties",
    "NonNegative": "tikhon.penalties",
    "NuclearNorm": "tikhon.penalties",
    "Orthogonal": "tikhon.penalties",
    "Simplex": "tikhon.penalties",
    "SparseGroupLasso": "tikhon.penalties",
    "SpectralBall": "tikhon.penalties",
    "SpectralNorm": "tikhon.penalties",
    "TopK": "tikhon.penalties",
    "TotalVariation": "tikhon.penalties",
    "UnitNorm": "tikhon.penalties",
    # modules
    "penalties": "",
    "testing": "",
    "strengths": "",
    "layers": "",
    "sklearn": "",
    "report": "",
    "integrations": "",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tikhon' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name] or f"tikhon.{name}")
    value = getattr(module, name) if _PUBLIC[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
