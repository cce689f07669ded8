"""The dropout family: noise layers whose rate is a buffer, and their insertion into models."""

from __future__ import annotations

from tikhon.layers import functional
from tikhon.layers.calibration import (
    TemperatureScaled,
    accuracy_rejection,
    expected_calibration_error,
    fit_temperature,
    scale_temperature,
)
from tikhon.layers.dropout import (
    AlphaDropout,
    Dropout,
    FeatureAlphaDropout,
    GaussianDropout,
    GaussianNoise,
)
from tikhon.layers.edit import Edit, insert_dropout, replace_dropout
from tikhon.layers.learned import ConcreteDropout, VariationalDropout
from tikhon.layers.montecarlo import Distribution, montecarlo, predict_distribution
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.rates import Curriculum, Early, Late, RateSchedule, set_rate, set_rate_by_depth
from tikhon.layers.recurrent import RecurrentDropout, WeightDrop
from tikhon.layers.shared_noise import common_noise
from tikhon.layers.sources import NoiseAudit, NoiseSource, audit
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
from tikhon.layers.weights import DropConnect, EmbeddingDropout, Mixout

__all__ = [
    "AlphaDropout",
    "ConcreteDropout",
    "Curriculum",
    "Distribution",
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
    "Edit",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "InputDropout",
    "Late",
    "LockedDropout",
    "Mixout",
    "NoiseAudit",
    "NoiseLayer",
    "NoiseSource",
    "PatchDropout",
    "RateSchedule",
    "RecurrentDropout",
    "ShakeDrop",
    "TemperatureScaled",
    "TokenDropout",
    "VariationalDropout",
    "WeightDrop",
    "WordDropout",
    "accuracy_rejection",
    "audit",
    "common_noise",
    "expected_calibration_error",
    "fit_temperature",
    "functional",
    "insert_dropout",
    "montecarlo",
    "predict_distribution",
    "replace_dropout",
    "scale_temperature",
    "set_rate",
    "set_rate_by_depth",
]
