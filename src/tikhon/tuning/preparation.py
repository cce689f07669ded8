"""Prepare the job of a search from user input: rows, folds, lengths, and the journal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from tikhon.data.nested import concatenate, take_rows, tensors, to_device
from tikhon.errors import InputError, unknown_name
from tikhon.layers.noise import NoiseLayer
from tikhon.numbers import check_seed
from tikhon.paths.targets import fold_rows
from tikhon.population.losses import RowLosses
from tikhon.runs.run_directory import JOURNAL
from tikhon.training.losses import LOSSES
from tikhon.training.settings import OPTIMIZERS, Settings, pick_device
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.metric import LEAST_BLOCKED, metric_of
from tikhon.tuning.runners import SearchJob, populate
from tikhon.tuning.space import Log, Space, Uniform
from tikhon.tuning.trials import Config

FEW_ROWS = 2_500  # rows below which a single held-out fifth is too noisy


def default_space(make: Callable[[Config], nn.Module]) -> Space:
    """Return lr and adaptive weight decay, and dropout if the model has such layers."""
    entries: dict[str, Any] = {"lr": Log(1e-4, 1e-1), "weight_decay": "auto"}
    if any(isinstance(m, NoiseLayer) for m in make({}).modules()):
        entries = {"dropout": Uniform(0, 0.8), **entries}
    return Space(**entries)


def optimizer_of(given: object) -> Callable[..., optim.Optimizer]:
    """Return the optimizer factory for a name or class; each trial builds its own."""
    if isinstance(given, str):
        if given not in OPTIMIZERS:
            raise InputError(unknown_name("optimizer", given, OPTIMIZERS))
        return OPTIMIZERS[given]
    if isinstance(given, optim.Optimizer) or not callable(given):
        raise InputError(
            "optimizer must be a name, a class or a factory, because each trial builds one of its "
            f"own; received {type(given).__name__} (give torch.optim.AdamW, or 'adamw')"
        )
    return cast("Callable[..., optim.Optimizer]", given)


def make_job(
    make: Callable[[Config], nn.Module],
    x: Any,
    y: Tensor,
    valid: tuple[Any, Tensor] | None,
    loss: object,
    folds: int | None,
    epochs: int | None,
    batch_size: int | None,
    optimizer: Callable[..., optim.Optimizer],
    device: str,
    seed: int,
    metric: object = None,
    direction: str | None = None,
    loader: DataLoader[object] | None = None,
) -> SearchJob:
    """Build the job: rows to train and score on, lengths, loss."""
    if folds is None:
        folds = 3 if len(y) < FEW_ROWS else 0
    folds = 0 if valid is not None else folds
    fold_mask = positions = None
    if folds:
        splits = fold_rows(y, folds, check_seed(seed))
        fold_mask = torch.ones(len(splits), len(y))
        for fold, (_, test) in enumerate(splits):
            fold_mask[fold, test] = 0
    elif valid is None:
        train, test = fold_rows(y, 5, check_seed(seed))[0]
        if loader is not None:
            positions = torch.full((len(y),), -1)
            positions[train] = torch.arange(len(train))
        (x, y), valid = take_rows((x, y), train), take_rows((x, y), test)
    rows = len(y)
    if batch_size is None:
        batch_size = 32 if rows < 1_000 else 64 if rows < 10_000 else 128
    if epochs is None:
        epochs = min(max(math.ceil(2_000 * batch_size / rows), 15), 150)
    Settings(batch_size=batch_size, epochs=epochs, seed=seed)  # validates
    target_device = pick_device(device)
    objective = RowLosses(loss, y)
    if metric is None and direction is not None:
        raise InputError(f"direction={direction!r} is of a metric: give metric= too")
    job = SearchJob(
        build=make,
        x=to_device(x, target_device),
        y=y.to(target_device),
        valid=None if valid is None else to_device(valid, target_device),
        fold_mask=None if fold_mask is None else fold_mask.to(target_device),
        objective=objective,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        seed=seed,
        metric=None if metric is None else metric_of(metric, direction, objective.loss),
        loader=loader,
        positions=positions,
    )
    min_rows = 2 if job.metric is None else LEAST_BLOCKED
    if (count := len(job.scored[1])) < min_rows:
        raise InputError(
            f"trials are compared on rows: {count}, and what chooses among them needs {min_rows} "
            "to tell differences from chance: give more rows in valid, or folds"
        )
    return job


def check_shared_entries(job: SearchJob, space: Space, default: Config) -> None:
    """Raise `InputError` for optimizers and batch sizes of a space that no trial can have."""
    if job.loader is not None and "batch_size" in space:
        raise InputError(
            f"the space varies batch_size, and the {type(job.loader.sampler).__name__} of the "
            "loader draws the batches: give the rows, or a loader that only shuffles"
        )
    if "optimizer" in space:
        entry = space["optimizer"]
        names = [entry] if isinstance(entry, str) else space.range("optimizer").grid(1)
        for name in names:
            populate(job, [{**default, "optimizer": str(name)}])


def all_rows(job: SearchJob, x: Any, y: Tensor, valid: tuple[Any, Tensor] | None) -> SearchJob:
    """Return the job of the refit, on training and validation rows together."""
    rows = (x, y) if valid is None else concatenate([(x, y), valid])
    x, y = to_device(rows, job.y.device)
    return replace(job, x=x, y=y, valid=None, fold_mask=None, positions=None)


def open_journal(
    output: str | Path | None, resume: bool, space: Space, job: SearchJob, budget: object
) -> SearchJournal | None:
    """Open the journal in `output`, new or continued; None without a folder."""
    if output is None:
        if resume:
            raise InputError("resume needs output, the folder of the search to continue")
        return None
    data = hashlib.sha256()
    for part in tensors((job.x, job.y, *(job.valid or ()))):
        data.update(f"{part.dtype}{tuple(part.shape)}".encode())
        data.update(part.contiguous().cpu().numpy().tobytes())
    header = {
        "space": space.to_dict(),
        "data": {"rows": len(job.y), "sha256": data.hexdigest()[:16]},
        "seed": job.seed,
        "folds": job.folds,
        "epochs": job.epochs,
        "batch_size": job.batch_size,
        "budget": str(budget),
    }
    if job.objective.loss.name not in LOSSES:
        header["loss"] = job.objective.loss.name
    if job.metric is not None:
        header["metric"] = job.metric.name
    if job.loader is not None:
        header["sampler"] = type(job.loader.sampler).__name__
    return SearchJournal(Path(output) / JOURNAL, header, resume=resume)
