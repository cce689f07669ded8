"""Solution paths of linear models: exact solutions from the largest strength, and scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.errors import InputError
from tikhon.paths.linear import SEPARATED, Fit, LinearProblem, linear_loss
from tikhon.paths.penalised import FeaturePenalty
from tikhon.paths.result import PathResult, mean_and_error
from tikhon.paths.solver import TOLERANCE, refit, solve
from tikhon.paths.targets import Targets, fold_rows
from tikhon.paths.universal import universal_strength
from tikhon.penalties import Penalty
from tikhon.runs.checkpoint import PeriodicCheckpoint

SCORED = 1e-5  # tolerance of fits that only give a held-out loss


@dataclass(frozen=True, eq=False)
class LinearPath:
    """A linear model on given rows, its penalty, and options of its solutions."""

    x: Tensor
    targets: Targets
    penalty: FeaturePenalty
    weights: Tensor | None = None
    debias: bool = False

    @classmethod
    def of(
        cls,
        build_model: Callable[[], nn.Module] | None,
        x: Tensor,
        y: Tensor,
        penalty: Penalty,
        *,
        weights: Tensor | None,
        positive: bool,
        debias: bool,
    ) -> LinearPath:
        """Build from the arguments of `path`."""
        model = build_model() if build_model else None
        name, layer = ("weight", None) if model is None else linear_layer(model)
        targets = Targets.of(y, None if layer is None else layer.out_features)
        if layer is not None and layer.out_features != targets.outputs:
            raise InputError(
                f"the model has {layer.out_features} outputs, the targets {targets.outputs}"
            )
        features = x[0].numel()
        bound = FeaturePenalty.of(penalty, targets.outputs, features, positive=positive, name=name)
        if debias and positive:
            raise InputError("debias refits without any penalty or sign: leave positive out")
        return cls(x, targets, bound, weights, debias)

    def problem(self, rows: Tensor | slice = slice(None)) -> LinearProblem:
        """Return the loss on some of the rows."""
        return LinearProblem(
            self.x[rows],
            self.targets.codes[rows],
            self.targets.kind,
            outputs=self.targets.outputs,
            weights=None if self.weights is None else self.weights[rows],
        )

    def is_separated(self, result: PathResult) -> bool:
        """Return whether the path ends without a penalty and separates the classes of all rows."""
        weights, biases = result.coefficients, result.intercepts
        if self.targets.kind == "squared" or result.strengths[-1] or weights is None:
            return False
        assert biases is not None
        z = self.x.reshape(len(self.x), -1).double() @ weights[-1].T + biases[-1]
        codes = self.targets.codes
        return float(linear_loss(z, codes, self.targets.kind).mean()) < SEPARATED

    def scores(
        self,
        splits: Sequence[tuple[Tensor, Tensor]],
        grid: Sequence[float],
        progress: PathProgress,
        report: Callable[[], None],
    ) -> tuple[list[float], list[float]]:
        """Return mean held-out loss over folds and its standard error, for each strength."""
        for fold, (train, test) in enumerate(splits):
            if fold == len(progress.losses):
                progress.losses.append([])
                progress.last = None
            losses = progress.losses[fold]
            if len(losses) == len(grid):
                continue  # computed by an earlier process
            problem = self.problem(train)
            held_out = self.x[test], self.targets.codes[test]
            row_weights = None if self.weights is None else self.weights[test]
            remaining = grid[len(losses) :]
            for fit in solve_grid(
                problem, self.penalty, remaining, tolerance=SCORED, start=progress.last
            ):
                model = refit(problem, fit.weight != 0) if self.debias else fit
                losses.append(_weighted_mean(row_losses(problem, model, *held_out), row_weights))
                progress.last = fit
                report()
        table = torch.tensor(progress.losses, dtype=torch.float64)
        return table.mean(0).tolist(), (table.std(0) / math.sqrt(len(splits))).tolist()


@dataclass(eq=False)
class PathProgress:
    """PathProgress of a path: solutions, held-out losses of each fold, the last fit."""

    fits: list[Fit]
    losses: list[list[float]]
    last: Fit | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> PathProgress:
        """Restore from `state()`; an empty state starts a path."""
        last = state.get("last")
        fits = [Fit(*row) for row in state.get("fits", ())]
        losses = [list(row) for row in state.get("losses", ())]
        return cls(fits, losses, None if last is None else Fit(*last))

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        last = None if self.last is None else _fit_to_list(self.last)
        return {"fits": [_fit_to_list(f) for f in self.fits], "losses": self.losses, "last": last}


def _fit_to_list(fit: Fit) -> list[object]:
    return [fit.weight, fit.bias, fit.residual, fit.steps]


def solve_path(
    path: LinearPath,
    build_model: Callable[[], nn.Module] | None,
    *,
    valid: tuple[Tensor, Tensor] | None,
    folds: int,
    strengths: int | Sequence[float] | str,
    smallest: float | None,
    seed: int,
    keeper: PeriodicCheckpoint,
    on_progress: Callable[[float], None],
) -> PathResult:
    """Return all solutions, scored on folds or validation rows if given."""
    splits = fold_rows(path.targets.codes, folds, seed) if folds else []
    problem = path.problem()
    if isinstance(strengths, str):
        grid = [universal_strength(problem, path.penalty, seed=seed)]
    else:
        grid = strength_grid(problem, path.penalty, strengths, smallest)
    progress = PathProgress.of(keeper.found)
    done = len(progress.fits) + sum(map(len, progress.losses))
    count, total = itertools.count(done + 1), len(grid) * (1 + len(splits))

    def report() -> None:
        on_progress(next(count) / total)
        keeper.save_if_due(progress.state)

    fits = progress.fits
    start = fits[-1] if fits else None
    for fit in solve_grid(problem, path.penalty, grid[len(fits) :], start=start):
        fits.append(fit)
        report()
    models = [refit(problem, fit.weight != 0) for fit in fits] if path.debias else fits
    scores, errors = [math.nan] * len(grid), [math.nan] * len(grid)
    if folds:
        scores, errors = path.scores(splits, grid, progress, report)
    elif valid is not None:
        codes = path.targets.encode(valid[1])
        rows = [row_losses(problem, fit, valid[0], codes) for fit in models]
        scores, errors = mean_and_error(torch.stack(rows))
    supports = torch.stack([(fit.weight != 0).any(0) for fit in fits])
    return _build_result(path, build_model, problem, grid, models, fits, supports, scores, errors)


def _build_result(
    path: LinearPath,
    build_model: Callable[[], nn.Module] | None,
    problem: LinearProblem,
    grid: Sequence[float],
    models: Sequence[Fit],
    fits: Sequence[Fit],
    supports: Tensor,
    scores: Sequence[float],
    errors: Sequence[float],
) -> PathResult:
    weight = torch.stack([fit.weight for fit in models])
    bias = torch.stack([problem.raw_bias(fit) for fit in models])
    dtype = torch.get_default_dtype()

    def build() -> nn.Module:
        return build_model() if build_model else nn.Linear(weight.shape[2], weight.shape[1])

    keys = list(build().state_dict())
    return PathResult(
        strengths=tuple(grid),
        supports=supports,
        importances=weight.norm(dim=1),
        scores=tuple(scores),
        errors=tuple(errors),
        states=tuple(dict(zip(keys, (w.to(dtype), b.to(dtype)))) for w, b in zip(weight, bias)),
        build=build,
        penalty=path.penalty.name,
        coefficients=weight,
        intercepts=bias,
        residuals=tuple(fit.residual for fit in fits),
        classes=path.targets.classes,
    )


def strength_grid(
    problem: LinearProblem,
    penalty: FeaturePenalty,
    strengths: int | Sequence[float] | Any,
    smallest: float | None,
) -> list[float]:
    """Return strengths in descending order, by default log-spaced from that of the empty model.

    Features with factor 0 are never penalised and always in the model.
    """
    if not isinstance(strengths, int):
        return sorted((float(s) for s in strengths), reverse=True)
    free = penalty.unpenalised(problem.empty().weight.shape)
    null = refit(problem, free) if free.any() else problem.empty()
    gradient = problem.gradient(null.weight, null.bias)[0].masked_fill(free, 0.0)
    has_no_signal = problem.spread == 0 or problem.distance(gradient, null.bias * 0) < TOLERANCE
    largest = 0.0 if has_no_signal else penalty.max_strength(gradient, problem.largest_step)
    if largest == 0:
        raise InputError("the targets do not depend on any feature: nothing to select")
    rows, columns = problem.x.shape
    ratio = smallest or (1e-3 if rows > columns else 1e-2)
    return (
        largest * torch.logspace(0, math.log10(ratio), strengths, dtype=torch.float64)
    ).tolist()


def check_strengths(strengths: object, smallest: float | None) -> Any:
    """Validate strengths: an int, a list or "universal"."""
    if isinstance(strengths, bool) or (isinstance(strengths, int) and strengths < 1):
        raise InputError(f"strengths must be a positive number of strengths, not {strengths}")
    if isinstance(strengths, str) and strengths != "universal":
        raise InputError(f"strengths={strengths!r}: give a number, a list or 'universal'")
    if not isinstance(strengths, str | int):
        try:
            strengths = torch.as_tensor(strengths, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"strengths must be numbers, received {strengths!r}") from error
        invalid = [s for s in strengths if not (math.isfinite(s) and s >= 0)]
        if invalid or not strengths:
            raise InputError(f"strengths must be finite and >= 0, received {invalid or 'none'}")
    if smallest is not None and not 0 < smallest < 1:
        raise InputError(f"smallest is a ratio in (0, 1), received {smallest}")
    return strengths


def solve_grid(
    problem: LinearProblem,
    penalty: FeaturePenalty,
    grid: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    start: Fit | None = None,
) -> Iterator[Fit]:
    """Yield the solutions from the largest strength to the smallest, with warm starts."""
    for strength in grid:
        start = solve(problem, penalty.at(strength), start=start, tolerance=tolerance)
        yield start


def row_losses(problem: LinearProblem, fit: Fit, x: Tensor, codes: Tensor) -> Tensor:
    """Return the loss of each row under a solution."""
    z = x.reshape(len(x), -1).double() @ fit.weight.T + problem.raw_bias(fit)
    return linear_loss(z, codes if problem.kind == "multinomial" else codes.double(), problem.kind)


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> float:
    if weights is None or not weights.any():
        return float(losses.mean())
    return float((losses * weights).sum() / weights.sum())


def linear_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name of the linear layer's weight, and the layer."""
    path, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return f"{path}.weight" if path else "weight", layer


def is_linear(model: nn.Module) -> bool:
    """Return whether the model is one linear layer with bias (after an optional Flatten)."""
    leaves = [m for m in model.modules() if not list(m.children())]
    layers = [m for m in leaves if not isinstance(m, (nn.Flatten, nn.Identity))]
    return len(layers) == 1 and isinstance(layers[0], nn.Linear) and layers[0].bias is not None
