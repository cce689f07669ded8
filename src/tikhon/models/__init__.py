"""Small networks built by name, for the command line and the estimators."""

from __future__ import annotations

from tikhon.models.average import Average
from tikhon.models.build import NAMES, build, is_name, restore
from tikhon.models.convnet import ConvNet
from tikhon.models.lenet import LeNet5
from tikhon.models.mlp import MLP
from tikhon.models.skip import SkipNetwork
from tikhon.models.spline import Spline, SplineNetwork

__all__ = [
    "MLP",
    "NAMES",
    "Average",
    "ConvNet",
    "LeNet5",
    "SkipNetwork",
    "Spline",
    "SplineNetwork",
    "build",
    "is_name",
    "restore",
]
