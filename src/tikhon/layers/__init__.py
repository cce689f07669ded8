"""The dropout family: noise layers whose rate is a buffer, put into a model and moved at will."""

from __future__ import annotations

from tikhon.layers import functional
from tikhon.layers.common import common_noise
from tikhon.layers.dropout import (
    AlphaDropout,
    Dropout,
    FeatureAlphaDropout,
    GaussianDropout,
    GaussianNoise,
)
from tikhon.layers.learned import ConcreteDropout, VariationalDropout
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.rates import (
    Curriculum,
    Early,
    Late,
    RateSchedule,
    set_rate,
    set_rate_by_depth,
)
from tikhon.layers.structured import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    InputDropout,
    LockedDropout,
    PatchDropout,
    ShakeDrop,
    TokenDropout,
    WordDropout,
)
from tikhon.layers.weights import DropConnect, EmbeddingDropout, Mixout, WeightDrop

__all__ = [
    "AlphaDropout",
    "ConcreteDropout",
    "Curriculum",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "Early",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "InputDropout",
    "Late",
    "LockedDropout",
    "Mixout",
    "NoiseLayer",
    "PatchDropout",
    "RateSchedule",
    "ShakeDrop",
    "TokenDropout",
    "VariationalDropout",
    "WeightDrop",
    "WordDropout",
    "common_noise",
    "functional",
    "set_rate",
    "set_rate_by_depth",
]
