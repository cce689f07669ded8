"""RegularizedClassifier and RegularizedRegressor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import Tags, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d

from tikhon.sklearn.fitting import RegularizedNetwork
from tikhon.sklearn.learning import Inputs, outputs
from tikhon.sklearn.saving import saveable
from tikhon.training.losses import LOSSES


@saveable
@dataclass(eq=False, repr=False)
class RegularizedClassifier(ClassifierMixin, RegularizedNetwork):
    r"""A network classifier whose objective is exactly mean loss plus `alpha` times a penalty.

    The objective is sum_i w_i loss_i / sum_i w_i + alpha * (l1_ratio*|W|_1 + (1-l1_ratio)/2*|W|^2)
    over the weight matrices (not biases), with the L1 part by prox, so its zeros are exact.
    `alpha` is that of Lasso and SGDClassifier (mean loss); MLPClassifier divides its own by the
    number of rows. Two classes have an output each: the L2 part is half that of their difference.
    Inputs are standardised internally, using the sample weights.

    Args:
        hidden_layer_sizes: units of each hidden layer; () gives a linear model, solved exactly
            (except with "auto", early stopping, `partial_fit` or over 50 million entries of X):
            batch_size, learning_rate_init, max_iter and tol are then ignored.
        activation: "relu", "tanh", "logistic" or "identity".
        alpha: strength, finite and >= 0; "auto" tunes it during training on a fifth of the rows.
        l1_ratio: 0 is L2, 1 is L1, in between the elastic net.
        penalty: "elastic_net" on all weights, or "group_lasso" on the columns of the first layer,
            which drops whole features (`support_`).
        dropout: rate of the hidden units, in [0, 1).
        batch_size: rows per step; "auto" is 200, or all rows if there are fewer.
        learning_rate_init: of Adam, > 0.
        max_iter: most epochs, >= 1.
        tol, n_iter_no_change: training ends when the objective (with early stopping: the
            validation loss) has not fallen by `tol` for so many epochs; for a regressor `tol` is
            in units of the targets' variance. ConvergenceWarning if `max_iter` is reached first;
            with np.inf all epochs run without a warning.
        early_stopping: hold out `validation_fraction` of the rows and restore the best weights.
        standardize: whether inputs (and targets of a regressor) are standardised.
        warm_start: `fit` continues from the previous weights, scaling and optimizer state.
        class_weight: None, "balanced" (the sample weights counted) or a dict from class to weight.
        random_state: of initial weights, dropout, batches and the held-out rows.

    Attributes:
        classes_, n_features_in_, feature_names_in_, n_iter_, loss_curve_, validation_scores_.
        alpha_: the strength used; with "auto" the tuned one (over training: `alpha_curve_`).
        coefs_, intercepts_: weights (in, out) of each layer, on standardised inputs.
        coef_, intercept_: of a linear model, in the units of the data.
        feature_importances_: norm of each feature's first-layer weights; support_: where non-zero.

    Reference: Hastie, Tibshirani, Wainwright, "Statistical Learning with Sparsity", 2015,
    https://hastie.su.domains/StatLearnSparsity/

    >>> from sklearn.datasets import load_breast_cancer
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = RegularizedClassifier(
    ...     (16,), alpha=0.05, penalty="group_lasso", max_iter=400, random_state=0)
    >>> model = model.fit(X[:400], y[:400])
    >>> model.score(X[400:], y[400:]) > 0.9, int(model.support_.sum()) < 30
    (True, True)
    """

    _numeric = False

    class_weight: Mapping[object, float] | str | None = field(default=None, kw_only=True)
    classes_: np.ndarray = field(init=False)

    def partial_fit(
        self,
        X: Inputs,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Train one epoch on these rows; `classes` lists all classes in the first call."""
        if self.class_weight == "balanced":
            raise ValueError(
                'partial_fit does not support class_weight="balanced": it needs the counts of all '
                "rows; give them as a dict"
            )
        if classes is not None:
            classes = np.unique(classes)
            if hasattr(self, "classes_") and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes={classes!r} differs from an earlier call: {self.classes_!r}"
                )
            self.classes_ = classes
            self._awaiting = True
        return self._partial(X, y, sample_weight)

    def predict(self, X: Inputs) -> np.ndarray:
        """Return the class of each row, or label indicators (rows, labels)."""
        found = self._predict_outputs(X)
        if self._multilabel:
            return (found > 0).astype(int)
        return self.classes_[found.argmax(1)]

    def predict_proba(self, X: Inputs) -> np.ndarray:
        """Return probabilities (rows, classes)."""
        found = torch.from_numpy(self._predict_outputs(X))
        return (found.sigmoid() if self._multilabel else found.softmax(1)).numpy()

    def predict_log_proba(self, X: Inputs) -> np.ndarray:
        """Return log probabilities, finite even where a probability rounds to 0."""
        found = torch.from_numpy(self._predict_outputs(X))
        return (F.logsigmoid(found) if self._multilabel else found.log_softmax(1)).numpy()

    def decision_function(self, X: Inputs) -> np.ndarray:
        """Return logits: (rows,) for two classes, (rows, classes) otherwise."""
        found = self._predict_outputs(X)
        if len(self.classes_) == 2 and not self._multilabel:
            return found[:, 1] - found[:, 0]
        return found

    def _encode(self, y, weights, *, reset):
        check_classification_targets(y)
        self._multilabel = type_of_target(y).startswith("multilabel")
        if self._multilabel:
            if self.class_weight is not None:
                raise ValueError("class_weight is for one class a row: y holds several labels")
            if not reset and y.shape[1] != self.network_.sizes[-1]:
                raise ValueError(
                    f"y has {y.shape[1]} labels, before it had {self.network_.sizes[-1]}"
                )
            self.classes_ = np.arange(y.shape[1])
            return np.asarray(y, np.float64), weights
        y = column_or_1d(y, warn=True)
        if reset and not getattr(self, "_awaiting", False):
            self.classes_ = np.unique(y)
            if len(left := np.unique(y[weights > 0])) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs two or more classes; y holds one class only: "
                    f"{left.tolist()[0]!r}"
                )
        self._awaiting = False
        codes = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
        if not (self.classes_[codes] == y).all():
            unknown_labels = np.setdiff1d(y, self.classes_)
            raise ValueError(
                f"y holds classes that were not there at first: {unknown_labels[:8]!r}"
            )
        if self.class_weight is not None:
            weights = weights * self._class_factors(y, codes, weights)
        return np.eye(len(self.classes_))[codes], weights

    def _class_factors(self, y, codes, weights):
        """Return `class_weight` factors (rows,), with classes counted by sample weight."""
        if self.class_weight == "balanced":
            counts = np.bincount(codes, weights, len(self.classes_))
            return (counts.sum() / len(counts) / np.where(counts > 0, counts, np.inf))[codes]
        factors = compute_sample_weight(self.class_weight, y)
        if not (factors >= 0).all() or not (factors * weights).any():
            raise ValueError(
                f"class_weight must be >= 0, and > 0 for a class of y; received "
                f"{self.class_weight!r}"
            )
        return factors

    @property
    def _loss(self):
        return LOSSES["bce" if self._multilabel else "cross_entropy"]

    def _score_of(self, network, rows):
        found = outputs(network, rows.x).numpy()
        if self._multilabel:
            return float(accuracy_score(rows.y > 0, found > 0, sample_weight=rows.weights))
        return float(accuracy_score(rows.y.argmax(1), found.argmax(1), sample_weight=rows.weights))

    def _squeeze_coefficients(self):
        if len(self.classes_) == 2 and not self._multilabel:
            intercept = np.asarray(self.intercept_)
            self.coef_: np.ndarray = self.coef_[1:] - self.coef_[:1]
            self.intercept_: np.ndarray | float = intercept[1:] - intercept[:1]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


@saveable
class RegularizedRegressor(MultiOutputMixin, RegressorMixin, RegularizedNetwork):
    r"""A network regressor whose objective is exactly mean loss plus `alpha` times a penalty.

    The objective is sum_i w_i |y_i - f(x_i)|^2 / (2 sum_i w_i) + alpha * penalty, on standardised
    inputs and targets: with `standardize=False` and `hidden_layer_sizes=()` it is that of Lasso
    (`l1_ratio=1`), ElasticNet, or Ridge with `alpha` times the number of rows. y may have several
    columns. Attributes as for `RegularizedClassifier`.

    Args:
        hidden_layer_sizes, activation, alpha, l1_ratio, penalty, dropout, batch_size,
            learning_rate_init, max_iter, tol, n_iter_no_change, early_stopping,
            validation_fraction, standardize, warm_start, random_state: as for
            RegularizedClassifier.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = RegularizedRegressor((), alpha=0.1, l1_ratio=1, random_state=0).fit(X, y)
    >>> int(model.support_.sum())  # the columns that Lasso keeps
    4
    """

    _numeric = True

    def partial_fit(self, X: Inputs, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train one epoch on these rows."""
        return self._partial(X, y, sample_weight)

    def predict(self, X: Inputs) -> np.ndarray:
        """Return predictions (rows,) or (rows, outputs)."""
        found = self._predict_outputs(X)
        return found[:, 0] if self._flat else found

    def _encode(self, y, weights, *, reset):
        y = np.asarray(y, np.float64)
        flat = y.ndim == 1
        if reset:
            self._flat = flat
        y = y[:, None] if flat else y
        if not reset and y.shape[1] != self.network_.sizes[-1]:
            raise ValueError(
                f"y has {y.shape[1]} outputs, before it had {self.network_.sizes[-1]}"
            )
        return y, weights

    @property
    def _loss(self):
        return LOSSES["half_mse"]

    def _score_of(self, network, rows):
        found = outputs(network, rows.x).numpy()
        return float(r2_score(rows.y, found, sample_weight=rows.weights))

    def _squeeze_coefficients(self):
        if self._flat:
            self.coef_: np.ndarray = self.coef_[0]
            self.intercept_: np.ndarray | float = float(np.ravel(self.intercept_)[0])
