"""The verb `path`: a penalty's whole range of strengths, warm-started, scored and chosen."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tikhon.data.batches import one_tensor, pair
from tikhon.data.classes import check_classes
from tikhon.data.dataset import fingerprint
from tikhon.data.rows import in_double
from tikhon.errors import DataError, InputError, unknown
from tikhon.numbers import checked_seed
from tikhon.paths.exact import LinearPath, checked_grid, follow, is_linear, strength_grid
from tikhon.paths.linear import SEPARABLE
from tikhon.paths.networks import network_path
from tikhon.paths.penalised import followed
from tikhon.paths.result import PathResult, Select
from tikhon.paths.targets import row_weights
from tikhon.penalties import Penalty
from tikhon.runs.checkpoint import Keeper
from tikhon.runs.interrupt import never, silent
from tikhon.runs.run_directory import CHECKPOINT

CONVERGED = 1e-6  # residual above which a solution is told to be unfinished


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
    positive: bool = False,
    sample_weight: Any = None,
    select: Select = "one_se",
    feature_names: Sequence[str] = (),
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[float], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> PathResult:
    """Solve `mean loss + strength * penalty` along a range of strengths.

    A linear model (`build_model` returns one `nn.Linear`, or is None) is solved exactly, from
    sparse to dense: half the mean squared error for float targets, the logistic or multinomial
    loss for integer ones, which are classes whatever their labels. Any other network goes from
    dense to sparse: its penalty (GroupLasso or Hierarchical) switches features off one by one,
    and every support met is trained on without the penalty.

    Args:
        build_model: called without arguments for a fresh model; None for a linear one.
        train: (x, y), a loader, a data set or its name; standardise the columns first.
        penalty: a Proximable; its own strength is ignored, its `weights` are not. One row of a
            group penalty (GroupLasso, GroupMCP, ...) is what a feature needs, SLOPE sees all
            weights, TotalVariation each output's weights in the order of the features.
        valid: rows for the scores, in the same forms as `train`.
        folds: cross-validation folds for the scores (linear models), 0 for none.
        strengths: how many, log-spaced from the smallest that empties the model down to
            `smallest` times that; or the strengths themselves, 0 included; or "universal", the
            quantile-universal threshold, which needs no validation (linear models).
        smallest: ratio in (0, 1), by default 1e-3 with more rows than features, else 1e-2.
        debias: refit every support without its penalty; scores are then those of the refits.
        positive: keep all weights >= 0 (linear models).
        sample_weight: one factor >= 0 a row: a row counts as often (linear models).
        select: "one_se" (sparsest within one standard error of the best) or "best".
        feature_names: for reading the result.
        seed: of the folds and of a network's training.
        output: folder for checkpoints, one every ten seconds; `resume` continues them bit for bit.
        stop: asked after every solution or step; once true, the path is saved and `Stopped`
            raised.
        on_progress: called with the share of the solutions found, in (0, 1] (linear models).
        on_warning: told of a damaged checkpoint that was passed over, instead of a warning.

    Raises `InputError` for a penalty that gives no zeros or that no path can follow (by name),
    fewer rows than folds, a class missing from the training rows, a malformed range of
    strengths, or a resume with other settings or other data. Warns of solutions that did not
    converge, and of a network that kept features to the end.

    Reference: Friedman, Hastie and Tibshirani (2010), https://doi.org/10.18637/jss.v033.i01

    >>> from sklearn.datasets import load_diabetes
    >>> from tikhon.penalties import L1
    >>> x, y = load_diabetes(return_X_y=True, scaled=True)
    >>> result = path(None, (x, y), L1(), strengths=20, folds=5)
    >>> result.counts[0], max(result.residuals) < 1e-8
    (0, True)
    """
    penalty = followed(penalty)
    if select not in ("one_se", "best"):
        raise InputError(unknown("select", select, ("one_se", "best")))
    x, y = pair(in_double(train), name="train")
    x = one_tensor(x, name="train", verb="path")
    held_out = None if valid is None else pair(in_double(valid), name="valid")
    if held_out is not None:
        held_out = one_tensor(held_out[0], name="valid", verb="path"), held_out[1]
    on_progress = on_progress or silent
    weights = row_weights(sample_weight, len(x))
    if weights is not None and not weights.all():  # a row of weight zero is not there
        x, y, weights = x[weights > 0], y[weights > 0], weights[weights > 0]
    _check_held_out(x, y, held_out)
    strengths = checked_grid(strengths, smallest)
    names, features = tuple(feature_names), x[0].numel()
    if names and len(names) != features:
        raise InputError(f"feature_names has {len(names)} names for {features} features")
    started = time.perf_counter()
    asked: dict[str, Any] = {
        "strengths": strengths,
        "smallest": smallest,
        "folds": folds,
        "debias": debias,
        "positive": positive,
        "sample_weight": None if weights is None else weights.tolist(),
        "seed": checked_seed(seed),
    }
    data = (x, y, *(held_out or ()))
    saving = {"resume": resume, "stop": stop or never, "say": on_warning}
    keeper = _keeper(output, saving, penalty, build_model, data, asked)
    shared = {"valid": held_out, "strengths": strengths, "seed": seed, "keeper": keeper}
    if build_model is None or is_linear(build_model()):
        given = LinearPath.of(
            build_model, x, y, penalty, weights=weights, positive=positive, debias=debias
        )
        result = follow(
            given,
            build_model,
            folds=folds,
            smallest=smallest,
            on_progress=on_progress,
            **shared,
        )
        _tell_unfinished(result)
        if result.strengths[-1] == 0 and given.separated(result.coefficients, result.intercepts):
            warnings.warn(SEPARABLE, stacklevel=2)
    else:
        if folds or strengths == "universal" or positive or debias or sample_weight is not None:
            raise InputError(
                "folds, 'universal', debias, positive and sample_weight are for linear models; a "
                "network is scored on valid"
            )
        result = network_path(build_model, (x, y), penalty, **shared)
        _tell_unswept(result)
    return replace(
        result,
        select=select,
        feature_names=names,
        seconds=time.perf_counter() - started,
    )


def _keeper(
    output: str | Path | None,
    saving: dict[str, Any],
    penalty: Penalty,
    build_model: Callable[[], nn.Module] | None,
    data: tuple[Tensor, ...],
    asked: dict[str, object],
) -> Keeper:
    if output is None:
        if saving["resume"]:
            raise InputError("resume needs output, the folder of the path to continue")
        return Keeper(stop=saving["stop"])
    header = asked | {
        "penalty": _described(penalty),
        "model": _shapes(build_model),
        "data": fingerprint(*data),
    }
    return Keeper(Path(output) / CHECKPOINT, header, **saving)


def _described(penalty: Penalty) -> dict[str, object]:
    """A penalty as a checkpoint knows it: without its own strength, tensors by their digest."""
    found: dict[str, object] = {"name": type(penalty).__name__}
    for entry in fields(penalty):
        value = getattr(penalty, entry.name)
        if entry.name != "strength":
            found[entry.name] = fingerprint(value) if isinstance(value, Tensor) else repr(value)
    return found


def _shapes(build_model: Callable[[], nn.Module] | None) -> list[object]:
    """The parameters of a model, by name and shape."""
    if build_model is None:
        return []
    with torch.random.fork_rng(devices=[]):
        return [[n, list(p.shape)] for n, p in build_model().named_parameters()]


def check_linear(
    train: tuple[Tensor, Tensor], penalty: Penalty, *, strengths: object, debias: bool
) -> None:
    """Raise what `path` would raise for a linear model, before anything is solved."""
    given = LinearPath.of(None, *train, penalty, weights=None, positive=False, debias=debias)
    if strengths != "universal":
        strength_grid(given.problem(), given.penalty, strengths, None)


def _check_held_out(x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor] | None) -> None:
    check_classes(y, None if held_out is None else held_out[1])
    if held_out is None:
        return
    if held_out[0].shape[1:] != x.shape[1:]:
        raise DataError(
            f"valid: its rows have the shape {tuple(held_out[0].shape[1:])}, those of train "
            f"{tuple(x.shape[1:])}; prepare both in the same way"
        )
    if held_out[1].is_floating_point() and not y.is_floating_point():
        raise DataError("valid: its targets are floats, those of train are classes")


def _tell_unfinished(result: PathResult) -> None:
    """A warning at the caller's line if a solution is not one."""
    left = [(r, s) for r, s in zip(result.residuals, result.strengths) if r > CONVERGED]
    if left:
        worst, strength = max(left)
        warnings.warn(
            f"{len(left)} of {len(result.strengths)} solutions of {result.penalty} did not "
            f"converge (residual {worst:.1e} at strength {strength:.4g}): standardise the "
            "columns, or take larger strengths",
            stacklevel=3,
        )


def _tell_unswept(result: PathResult) -> None:
    """A warning at the caller's line if a network kept features at the largest strength."""
    if left := result.counts[-1]:
        warnings.warn(
            f"the sweep of {result.penalty} ended with {left} of {result.supports.shape[1]} "
            "features on, so this is not the whole path: standardise the columns",
            stacklevel=3,
        )
