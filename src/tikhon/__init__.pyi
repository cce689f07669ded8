"""What `import tikhon` offers: each name is imported from its module when it is first used."""

from . import (
    integrations as integrations,
    layers as layers,
    penalties as penalties,
    report as report,
    sklearn as sklearn,
    strengths as strengths,
    testing as testing,
)
from .compaction import compact as compact
from .cures import cure as cure
from .diagnosis import diagnose as diagnose
from .monitoring import (
    NonFiniteError as NonFiniteError,
    watch as watch,
)
from .paths.path import path as path
from .paths.stability import stability as stability
from .penalties import (
    L1 as L1,
    L2 as L2,
    MCP as MCP,
    SCAD as SCAD,
    SLOPE as SLOPE,
    Box as Box,
    ElasticNet as ElasticNet,
    GroupLasso as GroupLasso,
    GroupMCP as GroupMCP,
    Hierarchical as Hierarchical,
    Huber as Huber,
    L1Ball as L1Ball,
    L2Ball as L2Ball,
    LInf as LInf,
    LogSum as LogSum,
    MaxNorm as MaxNorm,
    MinMaxNorm as MinMaxNorm,
    NonNegative as NonNegative,
    NuclearNorm as NuclearNorm,
    Orthogonal as Orthogonal,
    Penalty as Penalty,
    Proximable as Proximable,
    Simplex as Simplex,
    SparseGroupLasso as SparseGroupLasso,
    SpectralBall as SpectralBall,
    SpectralNorm as SpectralNorm,
    TopK as TopK,
    TotalVariation as TotalVariation,
    UnitNorm as UnitNorm,
)
from .regularizer.audit import audit as audit
from .regularizer.metric import register_gain as register_gain
from .regularizer.regularizer import regularize as regularize
from .regularizer.targets import select as select
from .regularizer.terms import Term as Term
from .sparsity import sparsify as sparsify
from .strengths import schedules as schedules
from .strengths.hypergradient import Hypergradient as Hypergradient
from .strengths.implicit import implicit_slopes as implicit_slopes
from .strengths.loss_weight import LossWeight as LossWeight
from .strengths.norm_bound import NormBound as NormBound
from .strengths.sparsity import TargetSparsity as TargetSparsity
from .training import fit as fit
from .training.recipe import Recipe as Recipe
from .tuning.space import (
    Choice as Choice,
    Int as Int,
    Log as Log,
    Space as Space,
    Uniform as Uniform,
)
from .tuning.tune import tune as tune

__version__: str
