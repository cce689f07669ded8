"""scikit-learn's own checks of estimators, each run by one of the four classes in turn."""

from __future__ import annotations

import pytest

from checks_in_turn import in_turn
from tikhon.sklearn import (
    RegularizedClassifier,
    RegularizedClassifierCV,
    RegularizedRegressor,
    RegularizedRegressorCV,
)

# most checks train for a few epochs only
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SMALL = {"alphas": [1e-3, 1e-2], "cv": 2, "max_iter": 4, "learning_rate_init": 0.2}
POPULATION = {"search": "population", "max_iter": 3}
CLASSES = [
    RegularizedClassifier((16,), max_iter=30),
    RegularizedClassifierCV((8,), **SMALL),
    RegularizedRegressor((16,), max_iter=30),
    RegularizedRegressorCV((8,), **SMALL | POPULATION),
]


@pytest.mark.parametrize(("estimator", "check"), in_turn(CLASSES))
def test_sklearn_contract(estimator, check):
    check(estimator)
