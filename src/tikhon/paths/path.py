"""The verb `path`: a penalty's whole range of strengths, warm-started, scored and chosen."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tikhon.data.batches import pair
from tikhon.errors import InputError
from tikhon.paths.linear import Fit, Kind, LinearProblem, linear_loss, refit, solve, view
from tikhon.penalties import Penalty, Proximable

Select = Literal["one_se", "best"]


@dataclass(frozen=True, eq=False)
class PathResult:
    """What a path found, one entry a strength, strongest first for linear models.

    `supports` (strengths, features) tells the features in use, `importances` how large their
    weights are, `coefficients` (strengths, outputs, features) exist for linear models. `scores`
    are mean validation losses (of the debiased models, if these were asked for) with standard
    `errors`; `best` has the lowest score and `one_se` is the sparsest within one error of it.
    """

    strengths: tuple[float, ...]
    supports: Tensor
    importances: Tensor
    scores: tuple[float, ...]
    errors: tuple[float, ...]
    states: tuple[dict[str, Tensor], ...]
    build: Callable[[], nn.Module]
    penalty: str
    select: Select = "one_se"
    coefficients: Tensor | None = None
    intercepts: Tensor | None = None
    residuals: tuple[float, ...] = ()
    feature_names: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def counts(self) -> list[int]:
        """How many features each strength keeps."""
        return self.supports.sum(1).tolist()

    @property
    def best(self) -> int:
        """Index of the lowest score; of two equal ones the sparser."""
        if not any(map(math.isfinite, self.scores)):
            raise InputError("the path was not scored: give valid or folds")
        finite = [i for i, score in enumerate(self.scores) if math.isfinite(score)]
        return min(finite, key=lambda i: (self.scores[i], self.counts[i]))

    @property
    def one_se(self) -> int:
        """Index of the sparsest model within one standard error of the best score.

        Reference: Breiman et al. (1984), Classification and regression trees.
        """
        best = self.best
        limit = self.scores[best] + self.errors[best]
        near = [i for i, score in enumerate(self.scores) if score <= limit]
        return min(near, key=lambda i: (self.counts[i], -self.strengths[i]))

    @property
    def chosen(self) -> int:
        """The index that `select` names; without scores the only strength."""
        if len(self.strengths) == 1:
            return 0
        return self.best if self.select == "best" else self.one_se

    def features(self, index: int | None = None) -> list[str]:
        """Names (or numbers) of the features in use, the most important first."""
        index = self.chosen if index is None else index
        order = self.importances[index].argsort(descending=True).tolist()
        names = self.feature_names or tuple(map(str, range(len(order))))
        return [names[j] for j in order if self.supports[index, j]]

    def model(self, index: int | None = None) -> nn.Module:
        """The model at a strength, by default at the chosen one."""
        model = self.build()
        model.load_state_dict(self.states[self.chosen if index is None else index])
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: figures without the models."""
        scored = any(map(math.isfinite, self.scores)) or len(self.strengths) == 1
        return {
            "schema_version": 1,
            "kind": "path",
            "penalty": self.penalty,
            "strengths": list(self.strengths),
            "counts": self.counts,
            "scores": [s if math.isfinite(s) else None for s in self.scores],
            "errors": [e if math.isfinite(e) else None for e in self.errors],
            "importances": [[float(f"{v:.6g}") for v in row] for row in self.importances.tolist()],
            "feature_names": list(self.feature_names),
            "chosen": self.chosen if scored else None,
            "selected": self.features() if scored else [],
            "seconds": self.seconds,
        }


def path(
    build_model: Callable[[], nn.Module] | None,
    train: Any,
    penalty: Penalty,
    *,
    valid: Any = None,
    folds: int = 0,
    strengths: int | Sequence[float] | Literal["universal"] = 100,
    smallest: float | None = None,
    debias: bool = False,
    select: Select = "one_se",
    feature_names: Sequence[str] = (),
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
) -> PathResult:
    """Solve `mean loss + strength * penalty` along a range of strengths.

    A linear model (`build_model` returns one `nn.Linear`, or is None) is solved exactly, from
    sparse to dense: half the mean squared error for float targets, the logistic or multinomial
    loss for integer ones. Any other network goes from dense to sparse: its penalty (GroupLasso or
    Hierarchical) switches features off one by one, and every support met is trained on without
    the penalty.

    Args:
        build_model: called without arguments for a fresh model; None for a linear one.
        train: (x, y), a loader, a data set or its name; standardise the columns first.
        penalty: a Proximable; its own strength is ignored.
        valid: rows for the scores, in the same forms as `train`.
        folds: cross-validation folds for the scores (linear models), 0 for none.
        strengths: how many, log-spaced from the smallest that empties the model down to
            `smallest` times that; or the strengths themselves; or "universal", the
            quantile-universal threshold, which needs no validation (linear models, L1).
        smallest: ratio in (0, 1), by default 1e-3 with more rows than features, else 1e-2.
        debias: refit every support without its penalty; scores are then those of the refits.
        select: "one_se" (sparsest within one standard error of the best) or "best".
        feature_names: for reading the result.
        seed: of the folds and of a network's training.
        on_progress: called with the share of the solutions found, in (0, 1] (linear models).

    Raises `InputError` for a penalty without a prox, fewer rows than folds, a class missing from
    the training rows, or a malformed range of strengths.

    Reference: Friedman, Hastie and Tibshirani (2010), https://doi.org/10.18637/jss.v033.i01

    >>> from sklearn.datasets import load_diabetes
    >>> from tikhon.penalties import L1
    >>> x, y = load_diabetes(return_X_y=True, scaled=True)
    >>> result = path(None, (x, y), L1(), strengths=20, folds=5)
    >>> result.counts[0], max(result.residuals) < 1e-8
    (0, True)
    """
    if not isinstance(penalty, Proximable) or penalty.constraint or penalty.smooth:
        raise InputError(
            f"a path needs a penalty whose prox gives zeros, such as L1, not {penalty!r}"
        )
    x, y = pair(train, name="train")
    held_out = None if valid is None else pair(valid, name="valid")
    _check_grid(strengths, smallest, folds, len(x))
    _check_classes(y, held_out)
    started = time.perf_counter()
    linear = build_model is None or _single_linear(build_model())
    if not linear:
        from tikhon.paths.networks import network_path

        if folds or strengths == "universal" or build_model is None:
            raise InputError("networks are scored on valid: folds and 'universal' are for linear")
        result = network_path(
            build_model, (x, y), penalty, valid=held_out, strengths=strengths, seed=seed
        )
    else:
        result = _linear_path(
            build_model, (x, y), penalty, held_out, folds, strengths, smallest, debias, seed,
            on_progress,
        )  # fmt: skip
    return replace(
        result,
        select=select,
        feature_names=tuple(feature_names),
        seconds=time.perf_counter() - started,
    )


def _linear_path(
    build_model: Callable[[], nn.Module] | None,
    data: tuple[Tensor, Tensor],
    penalty: Proximable,
    valid: tuple[Tensor, Tensor] | None,
    folds: int,
    strengths: int | Sequence[float] | str,
    smallest: float | None,
    debias: bool,
    seed: int,
    on_progress: Callable[[float], None],
) -> PathResult:
    x, y = data
    kind, outputs = _kind(y, build_model)
    cuts = fold_rows(y, folds, seed) if folds else []
    problem = LinearProblem(x, y, kind, outputs=outputs)
    if strengths == "universal":
        from tikhon.paths.stability import universal_strength

        grid = [universal_strength(x, y, penalty, kind=kind, outputs=outputs, seed=seed)]
    else:
        grid = strength_grid(problem, penalty, strengths, smallest)
    tell = _counted(on_progress, len(grid) * (1 + len(cuts)))
    fits = descend(problem, penalty, grid, tell=tell)
    models = [refit(problem, fit.weight != 0) for fit in fits] if debias else fits
    scores, errors = [math.nan] * len(grid), [math.nan] * len(grid)
    if folds:
        scores, errors = _cross_validated(data, kind, outputs, penalty, grid, cuts, debias, tell)
    elif valid is not None:
        rows = [_row_losses(problem, fit, valid, kind) for fit in models]
        scores = [float(r.mean()) for r in rows]
        errors = [float(r.std() / math.sqrt(len(r))) for r in rows]
    weight = torch.stack([fit.weight for fit in models])
    bias = torch.stack([problem.raw_bias(fit) for fit in models])
    dtype = torch.get_default_dtype()

    def build() -> nn.Module:
        return build_model() if build_model else nn.Linear(weight.shape[2], outputs)

    keys = list(build().state_dict())
    return PathResult(
        strengths=tuple(grid),
        supports=torch.stack([(fit.weight != 0).any(0) for fit in fits]),
        importances=weight.norm(dim=1),
        scores=tuple(scores),
        errors=tuple(errors),
        states=tuple(dict(zip(keys, (w.to(dtype), b.to(dtype)))) for w, b in zip(weight, bias)),
        build=build,
        penalty=type(penalty).__name__,
        coefficients=weight,
        intercepts=bias,
        residuals=tuple(fit.residual for fit in fits),
    )


def strength_grid(
    problem: LinearProblem,
    penalty: Proximable,
    strengths: int | Sequence[float] | Any,
    smallest: float | None,
) -> list[float]:
    """Log-spaced from the strength that empties the model, or the given ones, largest first."""
    if not isinstance(strengths, int):
        return sorted((float(s) for s in strengths), reverse=True)
    from tikhon.penalties.optimality import max_strength

    top = float(max_strength(penalty, view(penalty, problem.null_gradient())))
    if top == 0:
        raise InputError("the targets do not depend on any feature: nothing to select")
    rows, columns = problem.x.shape
    ratio = smallest or (1e-3 if rows > columns else 1e-2)
    return (top * torch.logspace(0, math.log10(ratio), strengths, dtype=torch.float64)).tolist()


def descend(
    problem: LinearProblem,
    penalty: Proximable,
    grid: Sequence[float],
    *,
    tolerance: float = 1e-9,
    tell: Callable[[], None] = lambda: None,
) -> list[Fit]:
    """The solutions from the largest strength to the smallest, each from the one before."""
    fits: list[Fit] = []
    for strength in grid:
        start = fits[-1] if fits else None
        member = penalty.with_strength(strength)
        fits.append(solve(problem, member, start=start, tolerance=tolerance))
        tell()
    return fits


def _counted(on_progress: Callable[[float], None], total: int) -> Callable[[], None]:
    """A function that counts its calls and tells which share of the total they are."""
    done = itertools.count(1)
    return lambda: on_progress(next(done) / total)


SCORED = 1e-5  # optimality of the fits that only give a held-out loss


def _cross_validated(
    data: tuple[Tensor, Tensor],
    kind: Kind,
    outputs: int,
    penalty: Proximable,
    grid: Sequence[float],
    cuts: Sequence[tuple[Tensor, Tensor]],
    debias: bool,
    tell: Callable[[], None],
) -> tuple[list[float], list[float]]:
    """Mean over folds of the held-out loss, and its standard error, for every strength."""
    x, y = data
    losses = []
    for train, test in cuts:
        problem = LinearProblem(x[train], y[train], kind, outputs=outputs)
        fits = descend(problem, penalty, grid, tolerance=SCORED, tell=tell)
        if debias:
            fits = [refit(problem, fit.weight != 0) for fit in fits]
        held_out = (x[test], y[test])
        losses.append([float(_row_losses(problem, f, held_out, kind).mean()) for f in fits])
    table = torch.tensor(losses, dtype=torch.float64)
    return table.mean(0).tolist(), (table.std(0) / math.sqrt(len(cuts))).tolist()


def fold_rows(y: Tensor, folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(training rows, held-out rows) of each fold, classes in proportion."""
    from sklearn.model_selection import KFold, StratifiedKFold

    if folds > len(y):
        raise InputError(f"{folds} folds need at least {folds} rows, received {len(y)}")
    if y.is_floating_point():
        cut = KFold(folds, shuffle=True, random_state=seed).split(y)
    else:
        least = int(torch.unique(y, return_counts=True)[1].min())
        if least < folds:
            raise InputError(
                f"{folds} folds, but the rarest class has {least} rows: use {least} folds or fewer"
                if least > 1
                else "a class has a single row: it cannot be in every fold; drop it or give valid"
            )
        cut = StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y)
    return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in cut]


def _row_losses(
    problem: LinearProblem, fit: Fit, data: tuple[Tensor, Tensor], kind: Kind
) -> Tensor:
    x = data[0].reshape(len(data[0]), -1).double()
    y = data[1] if kind == "multinomial" else data[1].double()
    return linear_loss(x @ fit.weight.T + problem.raw_bias(fit), y, kind)


def _kind(y: Tensor, build_model: Callable[[], nn.Module] | None) -> tuple[Kind, int]:
    """The loss and the number of outputs; a model's own number of outputs decides."""
    given = _linear_layer(build_model()).out_features if build_model else None
    if y.is_floating_point():
        return "squared", y.reshape(len(y), -1).shape[1]
    classes = int(y.max()) + 1
    if given == 1 or (given is None and classes == 2):
        return "logistic", 1
    return "multinomial", given or classes


def _linear_layer(model: nn.Module) -> nn.Linear:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


def _single_linear(model: nn.Module) -> bool:
    """Whether the model is one linear layer with a bias (a Flatten before it is allowed)."""
    leaves = [m for m in model.modules() if not list(m.children())]
    layers = [m for m in leaves if not isinstance(m, (nn.Flatten, nn.Identity))]
    return len(layers) == 1 and isinstance(layers[0], nn.Linear) and layers[0].bias is not None


def _check_grid(strengths: Any, smallest: float | None, folds: int, rows: int) -> None:
    if isinstance(strengths, bool) or (isinstance(strengths, int) and strengths < 1):
        raise InputError(f"strengths must be a positive number of strengths, not {strengths}")
    if isinstance(strengths, str) and strengths != "universal":
        raise InputError(f"strengths={strengths!r}: give a number, a list or 'universal'")
    if isinstance(strengths, Sequence) and not isinstance(strengths, str):
        bad = [s for s in strengths if not (math.isfinite(s) and s > 0)]
        if bad or not strengths:
            raise InputError(f"strengths must be finite and > 0, received {bad or 'none'}")
    if smallest is not None and not 0 < smallest < 1:
        raise InputError(f"smallest is a ratio in (0, 1), received {smallest}")
    if folds < 0 or folds == 1:
        raise InputError(f"folds must be 0 (none) or at least 2, received {folds}")
    if folds > rows:
        raise InputError(f"{folds} folds need at least {folds} rows, received {rows}")


def _check_classes(y: Tensor, valid: tuple[Tensor, Tensor] | None) -> None:
    """Every class has to be there to be learned, and to be scored."""
    if y.is_floating_point():
        return
    present = torch.unique(y)
    if len(present) < 2:
        raise InputError(f"the training rows hold the single class {present.tolist()}")
    if valid is not None and (unseen := set(valid[1].tolist()) - set(present.tolist())):
        raise InputError(f"the validation rows hold classes {sorted(unseen)} that train lacks")
