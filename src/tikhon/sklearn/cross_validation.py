"""Estimators that choose their strength by cross-validation, with a path or a population."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import (
    ClassifierMixin,
    MultiOutputMixin,
    RegressorMixin,
    clone,
    is_classifier,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from tikhon.errors import unknown_name
from tikhon.sklearn.estimators import RegularizedClassifier, RegularizedRegressor
from tikhon.sklearn.fitting import NetworkEstimator, RegularizedNetwork
from tikhon.sklearn.learning import Inputs
from tikhon.sklearn.population import evolve

_RANGE = (1e-4, 1.0)  # strengths of a path, for standardised inputs and mean loss
_SHARED_ATTRIBUTES = (  # with the best estimator
    *("n_iter_", "loss_curve_", "support_", "feature_importances_", "classes_"),
    *("coefs_", "intercepts_", "coef_", "intercept_"),
)


@dataclass(eq=False, repr=False)
class RegularizedNetworkCV(NetworkEstimator):
    """Base class: a path or a population on every fold, then the best strength on all rows."""

    _: KW_ONLY
    alphas: int | Sequence[float] = 8
    search: str = "path"
    cv: object = None
    scoring: object = None

    _kind: ClassVar[type[RegularizedNetwork]]  # of the underlying estimator

    def fit(
        self,
        X: Inputs,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Score strengths on every fold, then fit all rows with the best one.

        A path starts at the largest strength, each later one from the previous weights. A
        population trains one network for each strength and copies the better ones. `groups` are
        passed to the splitter.
        """
        if self.search not in ("path", "population"):
            raise ValueError(unknown_name("search", self.search, ("path", "population")))
        X, y = self._validated(X, y, reset=True)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        self.alphas_ = self._strength_grid()
        cv = cast("Any", self.cv)
        splitter = cast("Any", check_cv(cv, y, classifier=is_classifier(self)))
        folds = list(splitter.split(X, y, groups))
        scorer = self._scorer(self._make_estimator())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model = self._search_path(X, y, weights, folds, scorer)
        self.best_estimator_ = model
        self._warn_unconverged(caught)
        for name in _SHARED_ATTRIBUTES:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        return self

    def _scorer(self, model: RegularizedNetwork) -> Any:
        if isinstance(self.scoring, list | tuple | set | dict):
            raise ValueError(f"scoring must be one measure, received {self.scoring!r}")
        return check_scoring(model, scoring=self.scoring)

    def _search_path(self, X, y, weights, folds, scorer) -> RegularizedNetwork:
        """Fit on all rows, following the strengths that scored best."""
        model = self._make_estimator()
        if self.search == "population":
            return self._search_population(model, (X, y, weights), folds, scorer)
        scores = [self._score_path_on_fold(X, y, weights, rows, scorer) for rows in folds]
        self._set_results(np.array(scores).T)
        for alpha in self.alphas_[: self.best_index_ + 1]:
            model = self._with_strength(model, alpha).fit(X, y, sample_weight=weights)
        return model

    def _warn_unconverged(self, caught: list[warnings.WarningMessage]) -> None:
        """Warn once for all fits that did not converge, except in a population's short rounds."""
        unconverged = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
        for warning in caught:
            if warning not in unconverged:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        if unconverged and self.search == "path":
            warnings.warn(
                f"{len(unconverged)} fits of the path did not converge: raise max_iter (now "
                f"{self.max_iter}) or the smallest of alphas",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _strength_grid(self) -> np.ndarray:
        if isinstance(self.alphas, int | np.integer) and not isinstance(self.alphas, bool):
            if self.alphas < 1:
                raise ValueError(f"alphas must be 1 or more strengths, received {self.alphas!r}")
            return np.geomspace(_RANGE[1], _RANGE[0], int(self.alphas))
        try:
            given = np.asarray(self.alphas, float)
        except (TypeError, ValueError):  # not numbers
            given = np.empty(0)
        grid = np.unique(given)[::-1]
        if not grid.size or given.ndim != 1 or not np.isfinite(grid).all() or (grid < 0).any():
            raise ValueError(
                f"alphas must be a number of strengths or finite strengths >= 0, received "
                f"{self.alphas!r}"
            )
        return grid

    def _make_estimator(self) -> RegularizedNetwork:
        params = self.get_params(deep=False)
        shared = params.keys() & self._kind().get_params(deep=False).keys()
        return self._kind(**{name: params[name] for name in shared}, warm_start=True)

    def _with_strength(self, model: RegularizedNetwork, alpha: float) -> RegularizedNetwork:
        """Prepare the model for the next strength: same weights, new optimizer."""
        model.set_params(alpha=float(alpha))
        if hasattr(model, "network_"):
            model._optimizer_state = None
        return model

    def _search_population(self, model, data, folds, scorer) -> RegularizedNetwork:
        """Fit the network on all rows, following the best member's strengths."""
        X, y, weights = data

        def continue_fit(model, rows, alpha, epochs):
            model.set_params(alpha=float(alpha), max_iter=int(epochs))
            part = None if weights is None else weights[rows]
            return model.fit(X[rows], y[rows], sample_weight=part)

        def train(start, alpha, epochs):
            start = start or [cast("Any", clone(self._make_estimator())) for _ in folds]
            return [
                continue_fit(m, rows[0], alpha, epochs)
                for m, rows in zip(start, folds, strict=True)
            ]

        def score(models):
            pairs = zip(models, folds, strict=True)
            return [self._score(m, X, y, weights, test, scorer) for m, (_, test) in pairs]

        seed = check_random_state(self.random_state).randint(2**31)
        found = evolve(list(self.alphas_), self.max_iter, int(seed), train, score)
        self.alphas_, self.schedule_ = found.alphas, found.schedule
        self._set_results(found.scores)
        for alpha, epochs in self.schedule_:
            model = continue_fit(model, slice(None), alpha, epochs)
        return model.set_params(max_iter=self.max_iter)

    def _score(self, model, X, y, weights, test, scorer) -> float:
        test_weights = None if weights is None else weights[test]
        if test_weights is None or not test_weights.any():
            return scorer(model, X[test], y[test])
        return scorer(model, X[test], y[test], sample_weight=test_weights)

    def _score_path_on_fold(self, X, y, weights, rows, scorer) -> list[float]:
        train, test = rows
        model, scores = cast("RegularizedNetwork", clone(self._make_estimator())), []
        for alpha in self.alphas_:
            part = None if weights is None else weights[train]
            model = self._with_strength(model, alpha).fit(X[train], y[train], sample_weight=part)
            scores.append(self._score(model, X, y, weights, test, scorer))
        return scores

    def _set_results(self, scores: np.ndarray) -> None:
        mean = scores.mean(1)
        self.best_index_ = int(np.argmax(mean))  # first on ties: the strongest penalty
        self.best_score_ = float(mean[self.best_index_])
        self.alpha_ = float(self.alphas_[self.best_index_])
        self.cv_results_: dict[str, Any] = {
            "param_alpha": self.alphas_,
            "params": [{"alpha": float(alpha)} for alpha in self.alphas_],
            "mean_test_score": mean,
            "std_test_score": scores.std(1),
            "rank_test_score": (-mean).argsort(kind="stable").argsort() + 1,
            **{f"split{i}_test_score": column for i, column in enumerate(scores.T)},
        }

    def predict(self, X: Inputs) -> np.ndarray:
        """Predict with the best strength."""
        return self._fitted_best().predict(self._rows(X))

    def _fitted_best(self) -> Any:
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_

    def _score_best(self, X, y, sample_weight) -> float:
        model = self._fitted_best()
        weighted = {} if sample_weight is None else {"sample_weight": sample_weight}
        return float(self._scorer(model)(model, self._rows(X), y, **weighted))


@dataclass(eq=False, repr=False)
class RegularizedClassifierCV(ClassifierMixin, RegularizedNetworkCV):
    """RegularizedClassifier with `alpha` chosen by cross-validation.

    Args:
        alphas: a number of strengths from 1 down to 1e-4, or the strengths themselves.
        search: "path": strengths in descending order, each starting from the previous weights.
            "population": one network for each strength, trained for `max_iter` epochs; eight times
            the worst quarter copies the best and perturbs its strength, so that a strength may
            change during training (`schedule_`: (strength, epochs) of the best one).
        cv: folds: an int, a splitter or (train, test) pairs; 5 stratified ones by default.
        scoring: a scorer, as for GridSearchCV, also used by `score`; accuracy by default.
        hidden_layer_sizes, activation, l1_ratio, penalty, dropout, batch_size,
            learning_rate_init, max_iter, tol, n_iter_no_change, standardize, random_state,
            class_weight: as for RegularizedClassifier.

    Attributes:
        alpha_, alphas_, cv_results_, best_score_, best_index_, best_estimator_, and those of
        RegularizedClassifier.

    >>> from sklearn.datasets import load_breast_cancer
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = RegularizedClassifierCV((), alphas=[1e-3, 1e-1], cv=2, max_iter=50, random_state=0)
    >>> model.fit(X, y).alpha_
    0.001
    """

    _numeric = False
    _kind = RegularizedClassifier

    class_weight: Mapping[object, float] | str | None = field(default=None, kw_only=True)

    def score(self, X: Inputs, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the `scoring` value on these rows; higher is better."""
        return self._score_best(X, y, sample_weight)

    def predict_proba(self, X: Inputs) -> np.ndarray:
        """Return probabilities (rows, classes)."""
        return self._fitted_best().predict_proba(self._rows(X))

    def predict_log_proba(self, X: Inputs) -> np.ndarray:
        """Return log probabilities."""
        return self._fitted_best().predict_log_proba(self._rows(X))

    def decision_function(self, X: Inputs) -> np.ndarray:
        """Return logits: (rows,) for two classes, (rows, classes) otherwise."""
        return self._fitted_best().decision_function(self._rows(X))


class RegularizedRegressorCV(MultiOutputMixin, RegressorMixin, RegularizedNetworkCV):
    """RegularizedRegressor with `alpha` chosen by cross-validation.

    Attributes as for RegularizedClassifierCV; `scoring` is R2 by default.

    Args:
        alphas, search, cv, scoring: as for RegularizedClassifierCV.
        hidden_layer_sizes, activation, l1_ratio, penalty, dropout, batch_size,
            learning_rate_init, max_iter, tol, n_iter_no_change, standardize, random_state:
            as for RegularizedClassifier.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = RegularizedRegressorCV((), l1_ratio=1, cv=3, max_iter=50, random_state=0)
    >>> model.fit(X, y).best_score_ > 0.4
    True
    """

    _numeric = True
    _kind = RegularizedRegressor

    def score(self, X: Inputs, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the `scoring` value on these rows; higher is better."""
        return self._score_best(X, y, sample_weight)
