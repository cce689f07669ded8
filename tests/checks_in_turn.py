"""scikit-learn's checks of estimators, each run by one of the classes in turn."""

from __future__ import annotations

from functools import partial

import pytest
from sklearn.base import BaseEstimator
from sklearn.utils.estimator_checks import estimator_checks_generator


def of(check: partial) -> str:
    """A name that two classes share where they share the check."""
    return ",".join([check.func.__name__, *(f"{k}={v}" for k, v in check.keywords.items())])


def in_turn(estimators: list[BaseEstimator]) -> list:
    """Pairs of an estimator and a check: each check once, and slow for the other classes.

    Which of the classes runs a check changes from check to check; what one class alone has is run
    by that class.
    """
    pairs = [pair for one in estimators for pair in estimator_checks_generator(one, legacy=True)]
    owners: dict[str, list[BaseEstimator]] = {}
    for estimator, check in pairs:
        owners.setdefault(of(check), []).append(estimator)
    turn = {name: who[k % len(who)] for k, (name, who) in enumerate(owners.items())}
    return [
        pytest.param(
            estimator,
            check,
            id=f"{type(estimator).__name__}-{of(check)}",
            marks=() if turn[of(check)] is estimator else pytest.mark.slow,
        )
        for estimator, check in pairs
    ]
