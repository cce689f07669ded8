from __future__ import annotations

import matplotlib.pyplot
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LassoCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, KFold
from sklearn.preprocessing import StandardScaler

from tikhon.sklearn import (
    GradientFlowDisplay,
    LearningCurveDisplay,
    PathDisplay,
    RegularizedClassifier,
    RegularizedClassifierCV,
    RegularizedRegressor,
    RegularizedRegressorCV,
)
from tikhon.sklearn.population import evolve

matplotlib.use("Agg")
# most tests train for a few epochs only
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = load_diabetes(return_X_y=True)
XC, YC = load_breast_cancer(return_X_y=True)
SMALL = {"alphas": [1e-3, 1e-2], "cv": 2, "max_iter": 4, "learning_rate_init": 0.2}


def test_the_path_chooses_what_lasso_cv_chooses():
    x, y = StandardScaler().fit_transform(X), (Y - Y.mean()) / Y.std()
    folds = KFold(3, shuffle=True, random_state=0)
    alphas = np.array([0.01, 0.05, 0.2])
    theirs = LassoCV(alphas=alphas, cv=folds).fit(x, y)
    ours = RegularizedRegressorCV(
        (), alphas=alphas, cv=folds, l1_ratio=1, standardize=False, max_iter=200, tol=0,
        n_iter_no_change=200, batch_size=1000,
        scoring="neg_mean_squared_error", learning_rate_init=0.02, random_state=0,
    ).fit(x, y)  # fmt: skip
    order = np.argsort(theirs.alphas_)[::-1]
    np.testing.assert_allclose(
        -ours.cv_results_["mean_test_score"], theirs.mse_path_.mean(1)[order], rtol=0.01
    )
    assert ours.alpha_ == pytest.approx(theirs.alpha_)
    assert list(ours.alphas_) == sorted(ours.alphas_, reverse=True)
    assert ours.cv_results_["rank_test_score"][ours.best_index_] == 1


def test_a_population_finds_a_strength_and_can_be_followed():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 30))
    y = x[:, :3].sum(1) + 0.5 * rng.normal(size=60)
    model = RegularizedRegressorCV(
        (), alphas=6, search="population", cv=3, l1_ratio=1, max_iter=48, random_state=0, tol=0
    ).fit(x, y)
    again = clone(model).fit(x, y)
    assert model.cv_results_["mean_test_score"].shape == (6,)
    assert (np.diff(model.alphas_) <= 0).all() and model.alphas_.max() <= 1
    assert sum(epochs for _, epochs in model.schedule_) == 48
    assert model.schedule_[-1][0] == model.alpha_ == again.alpha_
    np.testing.assert_array_equal(model.coef_, again.coef_)
    plain = RegularizedRegressorCV((), alphas=[1e-4], cv=3, l1_ratio=1, max_iter=48).fit(x, y)
    assert model.best_score_ > plain.best_score_ + 0.02
    assert model.support_[:3].all() and not model.support_.all()


def test_the_worst_members_of_a_population_continue_from_the_best():
    told = []

    def train(start, alpha, epochs):
        told.append((start, round(alpha, 6), epochs))
        return [(start[0] if start else 0.0) + (1.0 if alpha < 0.02 else 0.0)]

    found = evolve([1.0, 0.1, 0.05, 0.01], 16, 0, train, lambda models: models)
    assert len(told) == 4 * 8 and all(epochs == 2 for *_, epochs in told)
    assert found.scores.max() == 8  # it has learned in every round,
    assert len(found.schedule) == 8 and all(a < 0.02 and n == 2 for a, n in found.schedule)
    assert (found.scores > 0).sum() > 1  # and others copied it


def test_a_population_refuses_what_it_cannot_do():
    for alphas in ([0.0, 1.0], [0.1]):
        with pytest.raises(ValueError, match="a population needs two different strengths"):
            RegularizedRegressorCV((), alphas=alphas, search="population").fit(X, Y)
    with pytest.raises(ValueError, match="did you mean 'population'"):
        RegularizedRegressorCV((), search="populations").fit(X, Y)


def test_strengths_are_checked():
    for alphas in (0, [], [-1.0], [np.inf], True, "auto"):
        with pytest.raises(ValueError, match="alphas must be"):
            RegularizedRegressorCV((), alphas=alphas).fit(X, Y)


def test_displays_draw():
    path = RegularizedClassifierCV((4,), **SMALL, random_state=0).fit(XC, YC)
    shown = PathDisplay.from_estimator(path)
    assert shown.ax_.get_xscale() == "log" and len(shown.alphas) == 2
    model = RegularizedClassifier((8, 8), max_iter=5, early_stopping=True).fit(XC, YC)
    assert len(LearningCurveDisplay.from_estimator(model).valid) == 5
    flow = GradientFlowDisplay.from_estimator(model, XC, YC)
    assert (flow.ratios > 0).all() and len(flow.layers) == 3
    regressor = RegularizedRegressor((4,), max_iter=3).fit(X, Y)
    assert GradientFlowDisplay.from_estimator(regressor, X, Y, ax=flow.ax_).ax_ is flow.ax_
    matplotlib.pyplot.close("all")


def test_folds_follow_groups_and_the_score_is_what_scoring_says():
    x, y, groups = XC[:120, :6], YC[:120], np.arange(120) // 7
    model = RegularizedClassifierCV((), alphas=[0.1, 0.01], cv=GroupKFold(3), scoring="roc_auc")
    model.fit(x, y, groups=groups)
    pairs = list(GroupKFold(3).split(x, y, groups))
    same = clone(model).set_params(cv=pairs).fit(x, y)
    assert model.best_score_ == same.best_score_
    assert model.score(x, y) == roc_auc_score(y, model.decision_function(x))
    with pytest.raises(ValueError, match="one measure"):
        clone(model).set_params(scoring=["roc_auc", "accuracy"]).fit(x, y, groups=groups)
