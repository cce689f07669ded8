"""Base class of the estimators: parameters, training, attributes."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from tikhon.data.splits import draw_rows
from tikhon.errors import unknown_name
from tikhon.layers import Dropout
from tikhon.paths.linear import SEPARABLE, SEPARATED, Kind
from tikhon.regularizer.audit import warn
from tikhon.sklearn.exact import solvable, solve_exactly
from tikhon.sklearn.learning import Inputs, Learner, Rows, predictions, summed_losses
from tikhon.sklearn.network import (
    ACTIVATIONS,
    PENALTIES,
    Network,
    moments,
    penalty_of,
    terms,
)
from tikhon.sklearn.saving import save
from tikhon.strengths.hypergradient import Hypergradient
from tikhon.strengths.sensitivity import steps_between_moves
from tikhon.training.losses import Loss

_AUTO_BATCH = 200
_SOLVERS: dict[str, Kind] = {  # loss -> loss of the linear solver
    "cross_entropy": "multinomial",
    "bce": "logistic",
    "half_mse": "squared",
}
_AUTO_FRACTION = 0.2  # of the rows, held out for alpha="auto"


@dataclass(eq=False, repr=False)
class NetworkEstimator(BaseEstimator, ABC):
    """Parameters of every estimator, as fields of scikit-learn's `__init__`, and input checks."""

    hidden_layer_sizes: Sequence[int] = (100,)
    activation: str = "relu"
    _: KW_ONLY
    l1_ratio: float = 0.0
    penalty: str = "elastic_net"
    dropout: float = 0.0
    batch_size: int | str = "auto"
    learning_rate_init: float = 0.01
    max_iter: int = 200
    tol: float = 1e-4
    n_iter_no_change: float = 10
    standardize: bool = True
    random_state: int | np.random.RandomState | None = None

    _numeric: ClassVar[bool]

    def _validated(self, X, y, *, reset: bool) -> tuple[Any, np.ndarray]:
        checked = validate_data(
            self,
            X,
            y,
            accept_sparse="csr",
            dtype=(np.float64, np.float32),
            multi_output=True,
            y_numeric=self._numeric,
            reset=reset,
        )
        return cast("tuple[object, np.ndarray]", checked)

    def _rows(self, X):
        """Check input rows for prediction by a fitted estimator."""
        check_is_fitted(self, ("network_", "best_estimator_"), all_or_any=any)
        types = np.float64, np.float32
        return validate_data(self, X, accept_sparse="csr", dtype=types, reset=False)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


@dataclass(eq=False, repr=False)
class RegularizedNetwork(NetworkEstimator):
    """Base class of both estimators: training and attributes."""

    _: KW_ONLY
    alpha: float | str = 1e-4
    early_stopping: bool = False
    validation_fraction: float = 0.1
    warm_start: bool = False

    coefs_: list[np.ndarray] = field(init=False)
    intercepts_: list[np.ndarray] = field(init=False)
    coef_: np.ndarray = field(init=False)  # linear models only
    intercept_: np.ndarray | float = field(init=False)
    n_outputs_: int = field(init=False)
    support_: np.ndarray = field(init=False)
    feature_importances_: np.ndarray = field(init=False)

    # -- fitting ------------------------------------------------------------------------------

    def fit(self, X: Inputs, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to rows X (n, features), dense or sparse, and targets y; returns self.

        Raises ValueError for parameters out of range and for unusable data.
        """
        continues = self.warm_start and hasattr(self, "network_")
        x, targets, weights = self._check(X, y, sample_weight, reset=not continues)
        if continues:
            x = self._prepare_continuation(x)
        else:
            self._start_network(x, targets, weights)
        exact = not self.hidden_layers and not self.early_stopping and self.alpha != "auto"
        if exact and solvable(x.shape):
            self._solve_exactly(x, targets, weights, continues=continues)
        else:
            self._train(x, targets, weights, self.max_iter)
        return self

    @property
    def hidden_layers(self) -> int:
        """Number of hidden layers; 0 for a linear model."""
        return int(np.atleast_1d(self.hidden_layer_sizes).size)

    def _solve_exactly(
        self, X: object, targets: np.ndarray, weights: np.ndarray, *, continues: bool
    ) -> None:
        """Solve a linear model exactly; the loss curve has one entry."""
        network = self.network_
        rows = Rows.of(X, self._scale_targets(targets), weights)
        unit = self._penalty_unit()
        penalty = penalty_of(
            self.penalty, float(self.alpha), float(self.l1_ratio), linear=1 / unit
        )
        kind = _SOLVERS[self._loss.name]
        objective, converged = solve_exactly(network, rows, kind, penalty, again=continues)
        separated = kind != "squared" and not self.alpha and objective < SEPARATED
        if separated:  # more iterations would not help
            warnings.warn(SEPARABLE, ConvergenceWarning, stacklevel=3)
        elif not converged:
            self._warn_unconverged("the solver of the linear model", depth=4)
        self.loss_curve_.append(objective * unit**2)
        self.n_iter_ += 1
        self.best_loss_, self.alpha_ = objective * unit**2, float(self.alpha)
        self._optimizer_state = None
        self._set_fitted_attributes()

    def _scale_targets(self, targets: np.ndarray) -> np.ndarray:
        """Return the targets as the network sees them."""
        if not self._numeric:
            return targets
        offset, unit = (b.double().numpy() for b in (self.network_.offset, self.network_.unit))
        return (targets - offset) / unit

    def _penalty_unit(self) -> float:
        """Return the internal scale of the targets, which must not affect the objective."""
        return 1.0 if self.standardize else float(self.network_.unit[0])

    def _warn_unconverged(self, what: str, *, depth: int) -> None:
        """Warn at the line that called `fit`, `depth` calls above."""
        scaled = "" if self.standardize else ", or let standardize=True scale the inputs"
        warnings.warn(
            f"{what} did not converge: raise max_iter (now {self.max_iter}) or alpha{scaled}",
            ConvergenceWarning,
            stacklevel=depth,
        )

    def _partial(self, X, y, sample_weight) -> Self:
        unsupported = {"early_stopping=True": self.early_stopping}
        unsupported['alpha="auto"'] = self.alpha == "auto"
        for name, is_on in unsupported.items():
            if is_on:
                raise ValueError(f"partial_fit does not support {name}: it needs whole runs")
        first = not hasattr(self, "network_")
        X, targets, weights = self._check(X, y, sample_weight, reset=first)
        if first:
            self._start_network(X, targets, weights)
        else:
            X = self._prepare_continuation(X)
        self._train(X, targets, weights, 1, stops=False)
        return self

    def _check(self, X, y, sample_weight, *, reset: bool) -> tuple[Any, np.ndarray, np.ndarray]:
        self._check_parameters()
        X, y = self._validated(X, y, reset=reset)
        weights = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():
            raise ValueError("sample_weight is zero for every row; give at least one positive one")
        targets, weights = self._encode(y, weights, reset=reset)
        return X, targets, weights

    def _prepare_continuation(self, X):
        """Convert rows to the network's dtype, and apply the current parameters to the network.

        Raises ValueError for parameters that cannot be changed any more.
        """
        network = self.network_
        own, current = network.sizes[1:-1], np.atleast_1d(self.hidden_layer_sizes).astype(int)
        if own != tuple(current.tolist()):
            raise ValueError(
                f"the network to continue has hidden_layer_sizes={own}, now "
                f"{self.hidden_layer_sizes!r} are asked for: fit a clone, or with warm_start=False"
            )
        scaled = bool(network.shift.any()) or bool((network.scale != 1).any())
        if scaled and not self.standardize:
            raise ValueError(
                "the network to continue has standardised inputs, now standardize=False is asked "
                "for: fit a clone, or with warm_start=False"
            )
        network.activation = self.activation
        for noise in network.dropout:
            cast("Dropout", noise).set_rate(self.dropout)
        if self.early_stopping and self.validation_scores_ is None:
            self.validation_scores_ = []
        return X.astype(network.shift.numpy().dtype, copy=False)

    def _start_network(self, X, targets: np.ndarray, weights: np.ndarray) -> None:
        """Create a new network with its scaling, and an empty history."""
        self._random = check_random_state(self.random_state)
        sizes = (X.shape[1], *np.atleast_1d(self.hidden_layer_sizes).astype(int).tolist())
        dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._random.randint(2**31))
            shape = (*sizes, targets.shape[1])
            # initialised in float64, so that float32 rows give the same model
            network = Network(shape, self.activation, self.dropout, torch.float64)
            self.network_ = network.to(dtype).eval()
        rows = Rows.of(X, targets, weights)
        self._standardize(rows)
        self._optimizer_state = None
        self.loss_curve_: list[float] = []
        self.alpha_curve_: list[float] = []
        self.validation_scores_: list[float] | None = [] if self.early_stopping else None
        self.n_iter_ = 0

    def _standardize(self, rows: Rows) -> None:
        statistics = {}
        if self.standardize:
            with np.errstate(over="ignore"):
                statistics["shift"], statistics["scale"] = moments(rows.x, rows.weights)
            if not np.isfinite(statistics["scale"]).all():
                column = int(np.flatnonzero(~np.isfinite(statistics["scale"]))[0])
                raise ValueError(f"column {column} of X is too large to be squared: scale it")
        if self._numeric:
            with np.errstate(over="ignore"):
                statistics["offset"], unit = moments(rows.y, rows.weights)
            if not np.isfinite(unit).all():
                raise ValueError(
                    f"y is too large to be squared, up to {np.abs(rows.y).max():.3g}: scale it"
                )
            # else one scale for all outputs, keeping their shares of the loss
            statistics["unit"] = unit if self.standardize else np.full_like(unit, unit.max())
        for name, value in statistics.items():
            buffer = getattr(self.network_, name)
            buffer.copy_(torch.from_numpy(value))
            stored = buffer.numpy()
            if not np.isfinite(stored).all() or ((stored == 0) & (value != 0)).any():
                raise ValueError(
                    f"{'y' if name in ('offset', 'unit') else 'X'} has a mean or deviation of "
                    f"{np.abs(value).max():.3g}, beyond the float type of X ({stored.dtype}): "
                    "scale it, or give X as float64"
                )

    def _train(
        self,
        X: object,
        targets: np.ndarray,
        weights: np.ndarray,
        epochs: int,
        *,
        stops: bool = True,
    ) -> None:
        network = self.network_
        rows, held_out = self._hold_out(Rows.of(X, self._scale_targets(targets), weights))
        size = min(_AUTO_BATCH, len(rows)) if self.batch_size == "auto" else int(self.batch_size)
        steps = epochs * -(-len(rows) // size)
        seed = int(self._random.randint(2**31))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            learner = Learner(
                network,
                self._loss,
                rows,
                terms(
                    self.penalty,
                    self._strength_source(held_out, steps),
                    float(self.l1_ratio),
                    layers=len(network.linear),
                    unit=self._penalty_unit(),
                ),
                lr=self.learning_rate_init,
                size=size,
                seed=seed,
                optimizer_state=self._optimizer_state,
            )
            self._run_epochs(learner, held_out, epochs, stops)
            self.alpha_ = self._current_strength(learner)
            self._optimizer_state = learner.close()
        self._set_fitted_attributes()

    def _hold_out(self, rows: Rows) -> tuple[Rows, Rows | None]:
        """Split off rows for early stopping or for tuning the strength."""
        if not (self.early_stopping or self.alpha == "auto"):
            return rows, None
        fraction = self.validation_fraction if self.early_stopping else _AUTO_FRACTION
        classes = not self._numeric and self._loss.kind != "binary"  # labels may come together
        y = torch.from_numpy(rows.y.argmax(1)) if classes else torch.arange(len(rows))
        count, seed = math.ceil(fraction * len(rows)), int(self._random.randint(2**31))
        drawn = draw_rows(y, count, seed, classes=classes)
        if drawn is None:
            raise ValueError(
                f"{len(rows)} rows are too few to hold out {count} and train on every class: give "
                "more, a smaller validation_fraction, or a number for alpha"
            )
        train, held_out = (rows.take(np.sort(part.numpy())) for part in drawn)
        return train, held_out

    def _strength_source(self, held_out: Rows | None, steps: int) -> float | Hypergradient:
        if self.alpha != "auto":
            return float(self.alpha)
        assert held_out is not None
        x, y, weights = held_out.batch(slice(None))
        weighted_targets = torch.cat([y, (weights / weights.mean())[:, None]], dim=1)

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (target[:, -1] * summed_losses(self._loss, output, target[:, :-1])).mean()

        data = (x, weighted_targets)
        return Hypergradient(data, loss, steps=steps, every=steps_between_moves(steps))

    def _run_epochs(
        self, learner: Learner, held_out: Rows | None, epochs: int, stops: bool
    ) -> None:
        best, epochs_without_gain, best_state = np.inf, 0, None
        unit, ended = self._penalty_unit() ** 2, not stops or self.alpha == "auto"
        for number in range(epochs):
            loss = learner.epoch(number)
            if not np.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} after epoch {self.n_iter_ + 1}; lower "
                    f"learning_rate_init (now {self.learning_rate_init:g})"
                )
            self.loss_curve_.append(loss * unit)
            self.n_iter_ += 1
            if self.alpha == "auto":
                self.alpha_curve_.append(self._current_strength(learner))
            score = loss
            if self.early_stopping and held_out is not None:
                assert self.validation_scores_ is not None
                self.validation_scores_.append(self._score_of(learner.network, held_out))
                score = learner.score(held_out)
            if score < best - (0 if self.early_stopping else self.tol):
                epochs_without_gain = 0
            else:
                epochs_without_gain += 1
            if score < best:
                best = score
                if self.early_stopping:
                    state = learner.network.state_dict()
                    best_state = {name: value.clone() for name, value in state.items()}
            if stops and epochs_without_gain >= self.n_iter_no_change and self.alpha != "auto":
                ended = True
                break
        if not ended and np.isfinite(self.n_iter_no_change):
            self._warn_unconverged(f"{epochs} epochs of training", depth=5)
        if best_state is not None:
            learner.network.load_state_dict(best_state)
        self.best_loss_ = float(best) * unit

    def _current_strength(self, learner: Learner) -> float:
        if self.alpha != "auto":
            return float(self.alpha)
        assert learner.regularizer is not None
        strengths = [reading.strength for reading in learner.regularizer.trace()]
        return float(np.mean(strengths))

    def _set_fitted_attributes(self) -> None:
        """Set the fitted attributes of scikit-learn; `coef_` only for linear models."""
        linear = [m.weight.detach().numpy().T.copy() for m in self.network_.linear]  # type: ignore
        biases = [m.bias.detach().numpy().copy() for m in self.network_.linear]  # type: ignore
        self.coefs_, self.intercepts_ = list(linear), list(biases)
        if not self.standardize:
            unit, offset = self.network_.unit.numpy(), self.network_.offset.numpy()
            self.coefs_[-1], self.intercepts_[-1] = linear[-1] * unit, biases[-1] * unit + offset
        self.n_layers_ = len(linear) + 1
        self.n_outputs_ = linear[-1].shape[1]
        self.support_ = (linear[0] != 0).any(1)
        self.feature_importances_ = np.sqrt((linear[0] ** 2).sum(1))
        if len(linear) == 1:
            network = self.network_
            coef = linear[0].T / network.scale.numpy() * network.unit.numpy()[:, None]
            intercept = biases[0] * network.unit.numpy() + network.offset.numpy()
            self.coef_, self.intercept_ = coef, intercept - coef @ network.shift.numpy()
            self._squeeze_coefficients()

    def _check_parameters(self) -> None:
        sizes = np.atleast_1d(self.hidden_layer_sizes)
        are_integers = sizes.ndim == 1 and (sizes.dtype.kind in "iu" or not sizes.size)
        auto = isinstance(self.alpha, str) and self.alpha == "auto"
        size = self.batch_size
        checks = {
            "hidden_layer_sizes": (are_integers and not (sizes <= 0).any(), "positive integers"),
            "alpha": (auto or _is_in_range(self.alpha, 0, np.inf), 'finite and >= 0, or "auto"'),
            "l1_ratio": (_is_in_range(self.l1_ratio, 0, 1, closed=True), "in [0, 1]"),
            "dropout": (_is_in_range(self.dropout, 0, 1), "in [0, 1)"),
            "batch_size": (
                size == "auto" or _is_positive_integer(size),
                '"auto" or a positive integer',
            ),
            "learning_rate_init": (_is_in_range(self.learning_rate_init, 1e-300, np.inf), "> 0"),
            "max_iter": (_is_positive_integer(self.max_iter), "a positive integer"),
            "tol": (_is_in_range(self.tol, 0, np.inf), ">= 0"),
            "n_iter_no_change": (
                _is_positive_integer(self.n_iter_no_change) or self.n_iter_no_change == np.inf,
                "a positive integer or np.inf",
            ),
            "validation_fraction": (
                _is_in_range(self.validation_fraction, 1e-300, 1),
                "in (0, 1)",
            ),
        }
        for name, (is_valid, rule) in checks.items():
            if not is_valid:
                raise ValueError(f"{name} must be {rule}, received {getattr(self, name)!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))
        if self.penalty not in PENALTIES:
            raise ValueError(unknown_name("penalty", self.penalty, PENALTIES))
        if self.penalty == "group_lasso" and self.l1_ratio:
            warn(
                f"l1_ratio={self.l1_ratio} is of penalty='elastic_net': penalty='group_lasso' "
                "does not read it"
            )

    # -- predicting ---------------------------------------------------------------------------

    def _predict_outputs(self, X) -> np.ndarray:
        rows = self._rows(X)  # an estimator without a network is refused here
        return predictions(self.network_, rows)

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator as one safetensors file: arrays and JSON, without pickle.

        Raises NotFittedError before `fit`, and ValueError for parameters that JSON cannot
        represent.
        """
        if not hasattr(self, "network_"):
            raise NotFittedError(f"{type(self).__name__} is not fitted yet: nothing to save")
        save(self, path)

    # -- what differs -------------------------------------------------------------------------

    @abstractmethod
    def _encode(
        self, y: np.ndarray, weights: np.ndarray, *, reset: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return targets (rows, outputs) as numbers, and weights."""

    @property
    @abstractmethod
    def _loss(self) -> Loss:
        """The loss to minimise."""

    @abstractmethod
    def _score_of(self, network: Network, rows: Rows) -> float:
        """Return accuracy or R2."""

    @abstractmethod
    def _squeeze_coefficients(self) -> None:
        """Reshape `coef_` and `intercept_` as in scikit-learn's linear models."""


def _is_in_range(value: object, low: float, high: float, *, closed: bool = False) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number = float(value)
    return low <= number <= high if closed else low <= number < high


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
