"""Estimators with scikit-learn's names and semantics."""

from tikhon.sklearn.cross_validation import RegularizedClassifierCV, RegularizedRegressorCV
from tikhon.sklearn.displays import GradientFlowDisplay, LearningCurveDisplay, PathDisplay
from tikhon.sklearn.estimators import RegularizedClassifier, RegularizedRegressor
from tikhon.sklearn.saving import load

__all__ = [
    "GradientFlowDisplay",
    "LearningCurveDisplay",
    "PathDisplay",
    "RegularizedClassifier",
    "RegularizedClassifierCV",
    "RegularizedRegressor",
    "RegularizedRegressorCV",
    "load",
]
