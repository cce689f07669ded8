"""The function `path`: warm-started solutions over all strengths, scored and selected."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tikhon.copying import FreshModels
from tikhon.data.batches import one_tensor, pair
from tikhon.data.classes import check_classes
from tikhon.data.dataset import fingerprint
from tikhon.data.nested import keep_float64
from tikhon.errors import DataError, InputError, unknown_name
from tikhon.numbers import check_seed
from tikhon.paths.linear import SEPARABLE
from tikhon.paths.linear_path import (
    LinearPath,
    check_strengths,
    is_linear,
    solve_path,
    strength_grid,
)
from tikhon.paths.networks import network_path
from tikhon.paths.penalised import check_path_penalty
from tikhon.paths.result import Of, PathResult, Select
from tikhon.paths.targets import row_weights
from tikhon.paths.weights import weight_path
from tikhon.penalties import Penalty
from tikhon.runs.checkpoint import PeriodicCheckpoint
from tikhon.runs.interrupt import ignore_messages, never_stop
from tikhon.runs.run_directory import CHECKPOINT
from tikhon.training.settings import Settings

CONVERGED = 1e-6  # residual above which a solution is reported as unconverged


def path(
    build_model: Callable[[], nn.Module] | None,
    train: Any,
    penalty: Penalty,
    *,
    of: Of = "features",
    valid: Any = None,
    folds: int = 0,
    strengths: int | Sequence[float] | Literal["universal"] = 100,
    smallest: float | None = None,
    debias: bool = False,
    positive: bool = False,
    sample_weight: Any = None,
    select: Select = "one_se",
    feature_names: Sequence[str] = (),
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[float], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> PathResult:
    """Solve `mean loss + strength * penalty` along a range of strengths.

    A linear model (`build_model` returns one `nn.Linear`, or is None) is solved exactly, from
    sparse to dense: half the mean squared error for float targets, logistic or multinomial loss
    for integer ones, whose values are class labels. Other networks go from dense to sparse: the
    penalty (GroupLasso or Hierarchical) drops features one by one, and the networks with the
    supports encountered are refitted without it.

    With `of="weights"` the penalty acts on all weight matrices, as in
    `regularize(model, optimizer, penalty)`: one training without it, as by `fit` with the same
    epochs, lr, batch_size and seed, then one sweep of at most 1.3 times its steps, in which the
    strength rises, and the learning rate to 0.02. Each strength asked gets the network on
    the way whose objective is lowest for it, by its mean loss since the network before (over at
    least 256 rows), so the penalty never grows with a strength above 0.
    Strength 0 is the trained network; the largest is the smallest at which a network without
    these weights has the lowest objective.

    Args:
        build_model: a function that returns a fresh model; None for a linear one.
        train: (x, y), a loader, a data set or its name; standardise the columns first.
        penalty: a Proximable; its strength is ignored, its `weights` are used. One row of a group
            penalty (GroupLasso, GroupMCP, ...) is one feature, SLOPE acts on all weights,
            TotalVariation on each output's weights in feature order.
        of: what a network loses: "features" or single "weights" (rows of them under GroupLasso).
        valid: rows for the scores, in any form `train` may have.
        folds: cross-validation folds for the scores (linear models), 0 for none.
        strengths: a number of strengths, log-spaced from the smallest that empties the model down
            to `smallest` times it; or the strengths themselves, including 0; or "universal", the
            quantile-universal threshold, which needs no validation (linear models).
        smallest: ratio in (0, 1), by default 1e-3 with more rows than features, else 1e-2; 1e-3
            for weights.
        debias: refit every support without the penalty and score the refits (linear models and
            weights).
        positive: keep all weights >= 0 (linear models).
        sample_weight: a weight >= 0 for each row, equivalent to repetition (linear models).
        select: "one_se" (sparsest within one standard error of the best) or "best".
        feature_names: names used in the result (not for weights, which are named by layer).
        epochs, lr, batch_size: of the training with Adam from which a path of weights starts.
        seed: of the folds and of a network's training.
        output: folder for checkpoints, every ten seconds; `resume` continues them bit for bit.
        stop: called after every solution or step; once it returns true, the path is saved and
            `Stopped` raised.
        on_progress: called with the fraction of the path done, in (0, 1] (linear models and
            weights).
        on_warning: receives a message on a damaged checkpoint, instead of a warning.

    Raises `InputError` for a penalty that is unsuitable or gives no zeros, fewer rows than folds,
    a class missing from the training rows, malformed strengths, or a resume with other settings
    or data, and for a path of weights of a network that learned nothing. Warns of solutions that
    did not converge, and of a network that kept features to the end.

    References: Friedman, Hastie and Tibshirani (2010), https://doi.org/10.18637/jss.v033.i01;
    Lemhadri et al. (2021), https://jmlr.org/papers/v22/20-848.html (LassoNet, from dense to
    sparse); Amakor, Sonntag and Peitz (2023), https://arxiv.org/abs/2308.12044 (loss and penalty
    of all weights as a front)

    >>> from sklearn.datasets import load_diabetes
    >>> from tikhon.penalties import L1
    >>> x, y = load_diabetes(return_X_y=True, scaled=True)
    >>> result = path(None, (x, y), L1(), strengths=20, folds=5)
    >>> result.counts[0], max(result.residuals) < 1e-8
    (0, True)
    """
    penalty = check_path_penalty(penalty)
    check_names(select, of)
    x, y = _rows(train, "train")
    held_out = None if valid is None else _rows(valid, "valid")
    on_progress = on_progress or ignore_messages
    x, y, weights = _with_weights(x, y, sample_weight)
    _check_held_out(x, y, held_out)
    strengths = check_strengths(strengths, smallest)
    names, features = tuple(feature_names), x[0].numel()
    if names and len(names) != features:
        raise InputError(f"feature_names has {len(names)} names for {features} features")
    build_model, model = _fresh_models(build_model, x)
    started = time.perf_counter()
    settings: dict[str, Any] = {
        "strengths": strengths,
        "smallest": smallest,
        "folds": folds,
        "debias": debias,
        "positive": positive,
        "sample_weight": None if weights is None else weights.tolist(),
        "seed": check_seed(seed),
    }
    training = None
    if of == "weights":
        training = Settings(lr=lr, epochs=epochs, batch_size=batch_size, seed=seed)
        settings |= {"of": of, "lr": lr, "epochs": epochs, "batch_size": batch_size}
    elif (epochs, lr, batch_size) != (20, 1e-3, 64):
        raise InputError("epochs, lr and batch_size are for of='weights'")
    data = (x, y, *(held_out or ()))
    options = {"resume": resume, "stop": stop or never_stop, "say": on_warning}
    keeper = _make_keeper(output, options, penalty, model, data, settings)
    shared = {"valid": held_out, "strengths": strengths, "keeper": keeper}
    if build_model is None or model is None or is_linear(model):
        if of == "weights":
            raise InputError("of='weights' is for networks: a linear path has all weights already")
        linear = LinearPath.of(
            build_model, x, y, penalty, weights=weights, positive=positive, debias=debias
        )
        shared |= {"folds": folds, "smallest": smallest, "on_progress": on_progress, "seed": seed}
        result = solve_path(linear, build_model, **shared)
        _warn_unconverged(result)
        if linear.is_separated(result):
            warnings.warn(SEPARABLE, stacklevel=2)
    else:
        if folds or strengths == "universal" or positive or sample_weight is not None:
            raise InputError(
                "folds, 'universal', positive and sample_weight are for linear models; a network "
                "is scored on valid"
            )
        x = _as_inputs(model, x)
        shared["valid"] = held_out and (_as_inputs(model, held_out[0]), held_out[1])
        if training is not None:
            shared |= {"smallest": smallest, "debias": debias, "on_progress": on_progress}
            result = weight_path(build_model, (x, y), penalty, training, **shared)
            names = result.feature_names
        else:
            result = network_path(build_model, (x, y), penalty, debias=debias, seed=seed, **shared)
            _warn_features_left(result)
    seconds = time.perf_counter() - started
    return replace(result, select=select, feature_names=names, seconds=seconds)


def _rows(data: Any, name: str) -> tuple[Tensor, Tensor]:
    x, y = pair(keep_float64(data), name=name)
    return one_tensor(x, name=name, verb="path"), y


def _with_weights(x: Tensor, y: Tensor, given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows and their weights, without rows of weight zero."""
    weights = row_weights(given, len(x))
    if weights is None or weights.all():
        return x, y, weights
    return x[weights > 0], y[weights > 0], weights[weights > 0]


def check_names(select: str, of: str) -> None:
    """Raise `InputError` for an unknown choice or an unknown kind of path."""
    for name, value, known in (("select", select, Select), ("of", of, Of)):
        if value not in get_args(known):
            raise InputError(unknown_name(name, value, get_args(known)))


def _fresh_models(
    build_model: Callable[[], nn.Module] | None, x: Tensor
) -> tuple[FreshModels | None, nn.Module | None]:
    """Return a builder that returns no model twice, and a model to look at."""
    if build_model is None:
        return None, None
    example = x[:2].to(torch.get_default_dtype()) if x.is_floating_point() else x[:2]
    build = FreshModels(build_model, example)
    with torch.random.fork_rng(devices=[]):
        return build, build()


def _as_inputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return rows in the type of a network's weights, but whole numbers for embeddings."""
    looks_up = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    if looks_up and not x.is_floating_point():
        return x
    return x.to(next((p.dtype for p in model.parameters()), torch.get_default_dtype()))


def _make_keeper(
    output: str | Path | None,
    options: dict[str, Any],
    penalty: Penalty,
    model: nn.Module | None,
    data: tuple[Tensor, ...],
    settings: dict[str, object],
) -> PeriodicCheckpoint:
    if output is None:
        if options["resume"]:
            raise InputError("resume needs output, the folder of the path to continue")
        return PeriodicCheckpoint(stop=options["stop"])
    header = settings | {
        "penalty": _describe_penalty(penalty),
        "model": [[n, list(p.shape)] for n, p in model.named_parameters()] if model else [],
        "data": fingerprint(*data),
    }
    return PeriodicCheckpoint(Path(output) / CHECKPOINT, header, **options)


def _describe_penalty(penalty: Penalty) -> dict[str, object]:
    """Describe a penalty for a checkpoint: without strength, tensors by digest."""
    found: dict[str, object] = {"name": type(penalty).__name__}
    for entry in fields(penalty):
        value = getattr(penalty, entry.name)
        if entry.name != "strength":
            found[entry.name] = fingerprint(value) if isinstance(value, Tensor) else repr(value)
    return found


def check_linear(
    train: tuple[Tensor, Tensor], penalty: Penalty, *, strengths: object, debias: bool
) -> None:
    """Raise the errors of `path` for a linear model without solving it."""
    linear = LinearPath.of(None, *train, penalty, weights=None, positive=False, debias=debias)
    if strengths != "universal":
        strength_grid(linear.problem(), linear.penalty, strengths, None)


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


def _warn_unconverged(result: PathResult) -> None:
    """Warn at the caller's line of solutions that did not converge."""
    unconverged = [(r, s) for r, s in zip(result.residuals, result.strengths) if r > CONVERGED]
    if unconverged:
        worst, strength = max(unconverged)
        warnings.warn(
            f"{len(unconverged)} of {len(result.strengths)} solutions of {result.penalty} did not "
            f"converge (residual {worst:.1e} at strength {strength:.4g}): standardise the "
            "columns, or take larger strengths",
            stacklevel=3,
        )


def _warn_features_left(result: PathResult) -> None:
    """Warn at the caller's line of a network that kept features at the largest strength."""
    if remaining := result.counts[-1]:
        warnings.warn(
            f"the sweep of {result.penalty} ended with {remaining} of {result.supports.shape[1]} "
            "features on, so this is not the whole path: standardise the columns",
            stacklevel=3,
        )
