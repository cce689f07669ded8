"""Train a model with a recipe, and record the run in a folder if one is given."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tikhon
from tikhon.budget import parse_seconds
from tikhon.copying import copy_with_model
from tikhon.data.batches import pair
from tikhon.data.classes import check_classes
from tikhon.data.dataset import Dataset, fingerprint
from tikhon.data.forward import LossFunction
from tikhon.data.nested import tensors, to_device
from tikhon.errors import DataError, InputError, StorageError, describe, describe_misplaced
from tikhon.options import with_reruns
from tikhon.runs import checkpoint
from tikhon.runs.files import to_plain, write_bytes, write_tensors
from tikhon.runs.interrupt import ignore_messages, never_stop
from tikhon.runs.run_directory import (
    CHECKPOINT,
    HISTORY,
    MODEL,
    RESULT,
    RunDirectory,
)
from tikhon.training import measures
from tikhon.training.baselines import assess
from tikhon.training.folds import has_auto_strength, tune_on_folds
from tikhon.training.input_check import check_model_accepts
from tikhon.training.loop import Progress, Training
from tikhon.training.measures import Epoch
from tikhon.training.recipe import Recipe
from tikhon.training.refit import check_refit, refit_on_all_rows, with_found_strengths
from tikhon.training.result import Run, result_document
from tikhon.training.settings import Settings
from tikhon.training.strength_verdicts import has_adapted_strengths, judge_strengths

_SAVE_FAILURES = 3  # consecutive failed checkpoints (a full disk) that end the run


def fit(
    model: nn.Module,
    train: Any,
    recipe: Recipe | None = None,
    *,
    valid: Any = None,
    test: Any = None,
    loss: str | LossFunction = "auto",
    optimizer: str | Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] = "adam",
    lr: float = 1e-3,
    momentum: float = 0.0,
    schedule: str = "constant",
    batch_size: int = 64,
    epochs: int = 20,
    seed: int = 0,
    device: str = "auto",
    budget: str | None = None,
    unit: float = 1.0,
    output: str | PathLike[str] | None = None,
    about: Mapping[str, object] | None = None,
    refit: bool = False,
    linear: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: float = 10.0,
    stop: Callable[[], bool] | None = None,
    on_tick: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    conclude: Callable[[Run], Mapping[str, object]] | None = None,
) -> Run:
    """Train `model` in place with `recipe`; the global random state of torch is restored.

    Args:
        model: the module, moved to the device.
        train, valid, test: data in any form of `tikhon.data.pair`: (x, y) of tensors, arrays or
            frames, where x may be a tuple or a dictionary of inputs, a data set, a DataLoader, a
            path, a name. A `train` loader over a data set with a length is iterated each epoch,
            with its own batch size, sampler and workers; `valid` and `test` are read once.
        recipe: penalties, dropout, clipping, ...; none if None. A strength of "auto" is tuned on
            the loss on `valid`; without `valid`, copies of the model tune it on three folds of
            `train`, in a third of the steps each, and the run on all rows replays it.
        loss: "cross_entropy", "nll", "bce", "mse", "half_mse", "mae", "huber", a torch function or
            module, a callable of (output, target) or of (model, batch), with the batch as the data
            give it, or "auto" (cross-entropy for integer targets, otherwise mean squared error).
            Outputs (rows, 1) match targets (rows,).
        optimizer: "sgd", "adam", "adamw", ..., a function from parameters to optimizer, or an
            instance.
        lr, momentum: > 0; in [0, 1).
        schedule: of lr: "constant", "cosine", "linear" or "warmup_cosine".
        batch_size, epochs: 1 or more.
        seed: of the row order and all noise; the initial weights are not redrawn.
        device: "auto", "cpu", "cuda" or "mps".
        budget: training time limit, such as "60s", "5m" or "1h".
        unit: standard deviation of a standardised target, so that the rmse is in its own unit.
        output: folder for configuration, history, result, weights and checkpoints.
        refit: train once more from the same initial weights on train + valid, replaying the "auto"
            strengths of the first training; returns the refitted model.
        linear: also fit a linear model, as a baseline for the scores.
        about: further entries of `config.json`: data, model, command.
        resume: continue the run in `output` bit for bit from its last checkpoint.
        overwrite: replace an existing run in `output`.
        checkpoint_every: seconds between checkpoints.
        stop: called after each step; once it returns true, the run is saved and returns.
        on_tick, on_epoch, on_warning: called a few times a second, after each epoch, and on
            problems that do not end the run.
        conclude: called with the finished run before `output` is sealed; the entries that it
            returns join `result.json`.

    Raises `InputError` for settings out of range or a loss that is not finite, `DataError` for
    invalid data, `StorageError` when the folder cannot be written.

    >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
    >>> run = fit(nn.Linear(4, 2), (x, y), epochs=30, lr=0.1)
    >>> run.history[-1]["train/accuracy"] > 0.9
    True
    """
    recipe, stop = _check_arguments(model, recipe, unit), stop or never_stop
    if not checkpoint_every >= 0:
        raise InputError(f"checkpoint_every must be >= 0, received {checkpoint_every!r}")
    seconds = parse_seconds(budget)
    settings = Settings(
        loss, optimizer, lr, momentum, schedule, batch_size, epochs, seed, device, seconds
    )
    if output is not None:  # fail before any training
        RunDirectory(output).check(resume=resume, overwrite=overwrite)
    classes = train.classes if isinstance(train, Dataset) else ()
    train = pair(train, name="train") if isinstance(train, Iterator) else train  # readable once
    held_out = None if valid is None else pair(valid, name="valid")
    test_rows = None if test is None else pair(test, name="test")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        start = copy_with_model(model, model) if refit else None
        found = None
        if held_out is None and not refit and has_auto_strength(recipe):
            found = tune_on_folds(model, train, recipe, settings, unit, stop)
        training = Training(
            model, train, recipe, settings, unit=unit, valid=held_out, recorded=found
        )
        training.seconds = 0.0 if found is None else found.seconds
        _check_rows(training, test_rows)
        if refit:
            check_refit(training)
        hooks = {"stop": stop, "on_tick": on_tick, "on_epoch": on_epoch}
        if output is None:
            ended = training.run(**hooks)
            if start is not None and ended != "stopped":
                ended = refit_on_all_rows(training, start, stop) or ended
            return _build_run(training, ended, None, test_rows, linear=linear)
        with RunDirectory(output) as folder:
            config = _config(training, about or {})
            notify = on_warning or (lambda text: warnings.warn(text, stacklevel=2))
            _open_folder(folder, training, config, notify, resume=resume, overwrite=overwrite)
            saver = _Saver(folder, training, on_warning)

            def record_epoch(row: Epoch) -> None:
                folder.append(row)
                (on_epoch or ignore_messages)(row)

            hooks |= {"on_epoch": record_epoch, "save": saver, "save_every": checkpoint_every}
            ended = training.run(**hooks)
            if start is not None and ended != "stopped":
                saver()  # an interrupted refit restarts here
                ended = refit_on_all_rows(training, start, stop) or ended
            where, command = str(folder.path), tuple(config.get("command", ()))
            run = _build_run(training, ended, where, test_rows, command, linear=linear)
            if ended != "stopped":
                document = result_document(run, classes) | dict(conclude(run) if conclude else {})
                _write_results(folder, training, config, document)
            return run


def _check_arguments(model: object, recipe: object, unit: object) -> Recipe:
    """Check the types of the arguments and return the recipe, an empty one for None."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, such as nn.Linear(4, 2), received {describe(model)}"
        )
    if not isinstance(recipe, Recipe | None):
        raise InputError(
            "recipe must be a Recipe, such as Recipe(dropout=0.2), received "
            f"{describe_misplaced(recipe)}"
            + ("; Recipe(**options) makes one" if isinstance(recipe, Mapping) else "")
        )
    known = isinstance(unit, (int, float, Tensor)) and not isinstance(unit, bool)
    if not known or not 0 < float(cast("float", unit)) < math.inf:
        raise InputError(f"unit must be finite and > 0, received {unit!r}")
    return recipe or Recipe()


def _open_folder(
    folder: RunDirectory,
    training: Training,
    config: Mapping[str, object],
    notify: Callable[[str], None],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Create the run folder, or load the run it holds into `training`."""
    if resume and (folder.path / RESULT).exists():  # trained to the end, perhaps not sealed
        folder.refuse_finished()
    folder.take(config, resume=resume, overwrite=overwrite)
    if not resume:
        return
    if checkpoint.exists(folder.path / CHECKPOINT):
        state = checkpoint.load(folder.path / CHECKPOINT, say=notify)
        try:
            training.load_state_dict(state)
        except KeyError as error:
            raise DataError(
                f"{folder.path / CHECKPOINT} lacks {error}: another version of tikhon wrote it; "
                "continue with that version, or start over with --overwrite"
            ) from error
    folder.rewrite_history(training.history)


def _write_results(
    folder: RunDirectory,
    training: Training,
    config: Mapping[str, Any],
    document: dict[str, Any],
) -> None:
    """Write weights, history and result, and seal the folder."""
    if config.get("command"):
        document["next"] = with_reruns(config, document["next"])
    write_tensors(folder.path / MODEL, dict(training.model.state_dict()))
    if not (folder.path / HISTORY).exists():
        write_bytes(folder.path / HISTORY, b"")
    folder.write(RESULT, document)
    folder.finish()


class _Saver:
    """Write checkpoints; end the run after several failures in a row."""

    def __init__(
        self, folder: RunDirectory, training: Training, on_warning: Callable[[str], None] | None
    ) -> None:
        self._folder, self._training, self._warn = folder, training, on_warning
        self._failures = 0

    def __call__(self) -> None:
        try:
            checkpoint.save(self._folder.path / CHECKPOINT, self._training.state_dict())
            self._failures = 0
        except StorageError as error:
            self._failures += 1
            if self._failures >= _SAVE_FAILURES:
                raise
            if self._warn is not None:
                self._warn(f"checkpoint not written, training goes on: {error}")


def _config(training: Training, about: Mapping[str, object]) -> dict[str, Any]:
    model = training.model
    data: dict[str, object] = {
        "rows": training.stream.rows,
        "features": sum(part[0].numel() for part in tensors(training.x)),
    }
    if "data" not in about and training.stream.held is not None:
        data["fingerprint"] = fingerprint(*tensors(training.x), training.y)
    size = sum(p.numel() for p in model.parameters())
    return to_plain(
        {
            "kind": "fit",
            "data": data,
            "model": {"name": type(model).__name__, "parameters": size},
            **about,
            "optimizer": training.settings.describe(),
            "recipe": training.recipe.to_dict(),
            "seed": training.settings.seed,
            "device": str(training.device),
            "versions": versions(),
        }
    )


def versions() -> dict[str, object]:
    """Return the versions that a bit-exact repetition depends on besides the configuration."""
    return {
        "tikhon": tikhon.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _build_run(
    training: Training,
    ended: str,
    path: str | None,
    test: Any,
    command: tuple[str, ...] = (),
    *,
    linear: bool,
) -> Run:
    model, valid = training.model, training.valid
    last = training.history[-1] if training.history else {}
    metrics: Mapping[str, float] = {
        k: v for k, v in last.items() if k.startswith(("train/", "valid/"))
    }
    assessment = None
    if ended != "stopped":
        parts = {"train": (training.x, training.y)}
        if valid is not None:
            parts["valid"] = valid
        if test is not None:
            on_device = to_device(test, training.device)
            parts["test"] = on_device[0], training.loss.targets(on_device[1])
        assessment = assess(model, parts, training.loss, unit=training.unit, linear=linear)
        metrics = assessment.metrics
    penalties = measures.penalty_readings(training.regularizer)
    if ended != "stopped" and valid is not None and has_adapted_strengths(training.regularizer):
        assert training.regularizer is not None
        data = ((training.x, training.y), valid)
        verdicts = judge_strengths(model, training.regularizer, training.loss, *data)
        for name in penalties.keys() & verdicts.keys():
            penalties[name].update(verdicts[name])
    return Run(
        model,
        training.recipe,
        tuple(training.history),
        ended,
        training.best["epoch"],
        training.seconds,
        path,
        metrics,
        penalties,
        command,
        assessment,
        with_found_strengths(training.recipe, training.regularizer),
        None if training.sparsifier is None else training.sparsifier.audit(),
    )


def _check_rows(training: Training, test: tuple[Any, Tensor] | None) -> None:
    """Check the classes of the targets, and that the model accepts the rows it is scored on."""
    held, valid = training.stream.held, training.valid
    if held is not None:
        check_classes(training.y, None if valid is None else valid[1])
    if training.loss.kind == "whole":
        return
    x = None if held is None else held[0]
    if valid is not None:
        check_model_accepts(training.model, x, valid[0])
    if test is not None:
        check_model_accepts(training.model, x, to_device(test, training.device)[0], name="test")
