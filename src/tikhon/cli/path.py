"""tikhon path: the features a model needs, from the strongest penalty to the weakest."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from tikhon.cli import tables
from tikhon.cli.folders import about_data, about_network, config_of, output_of
from tikhon.cli.option_groups import flag
from tikhon.cli.options import Data, DataDir, Resumable, Seed, TestShare
from tikhon.cli.resuming import complete_files, report_interruption
from tikhon.errors import InputError, unknown_name
from tikhon.options import (
    DATA,
    MODEL,
    MODELS,
    REGULARIZATION,
    SPARSE_PENALTIES,
    TRAINING,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tikhon.paths.path import PathResult
    from tikhon.runs.run_directory import RunDirectory

_NETWORKS = ("hierarchical", "group_lasso")


def path(
    data: Data,
    penalty: Annotated[
        str,
        flag(
            "l1, mcp, scad, elastic_net, group_lasso, hierarchical, ...",
            REGULARIZATION,
            "NAME",
            names=SPARSE_PENALTIES,
        ),
    ] = "l1",
    of: Annotated[
        str,
        flag(
            "What is left out: features, or single weights of all layers of a network.",
            REGULARIZATION,
            "UNIT",
            names=("features", "weights"),
        ),
    ] = "features",
    model: Annotated[
        str | None,
        flag(
            "linear, or a network such as mlp:64 (group_lasso, hierarchical, --of weights).",
            MODEL,
            "MODEL",
            shown="mlp:64 for hierarchical and weights, else linear",
            names=MODELS,
        ),
    ] = None,
    strengths: Annotated[
        str,
        flag(
            "Number of strengths, a list such as 1,0.1,0.01, or universal (a single one, without "
            "validation).",
            REGULARIZATION,
            "N|S,S,...",
        ),
    ] = "100",
    folds: Annotated[int, flag("Folds of cross-validation for linear models.", DATA)] = 5,
    select: Annotated[
        str,
        flag(
            "best (lowest loss), or one_se: the sparsest within one standard error of it.",
            REGULARIZATION,
            "RULE",
            names=("one_se", "best"),
        ),
    ] = "one_se",
    debias: Annotated[
        bool, flag("Refit the chosen features without the penalty.", REGULARIZATION)
    ] = False,
    epochs: Annotated[
        int | None,
        flag("Length of the training that --of weights begins with.", TRAINING, "N", shown="20"),
    ] = None,
    lr: Annotated[
        float | None, flag("Learning rate of that training.", TRAINING, shown="1e-3")
    ] = None,
    test: TestShare = 0.2,
    *,
    table: tables.Rows,
    seed: Seed = 0,
    data_dir: DataDir = None,
    run: Resumable,
) -> int:
    """Follow a penalty from strong to weak, and choose the features that DATA needs.

    There is no --budget: a path that is cut short could choose only among its strongest
    penalties. Fewer --strengths or --folds take less time. Ctrl-C keeps what is solved, and
    --resume continues.
    """
    from tikhon.paths.path import check_names
    from tikhon.paths.weights import check_weight_penalty
    from tikhon.penalties import penalty_names

    check_names(select, of)
    kinds = penalty_names()
    if penalty not in kinds:
        raise InputError(unknown_name("penalty", penalty, SPARSE_PENALTIES))
    if of == "weights":
        check_weight_penalty(kinds[penalty]())
    model, grid = _check_model(model, penalty, of), _parse_strengths(strengths)
    length = {"epochs": epochs, "lr": lr}
    length = {name: value for name, value in length.items() if value is not None}
    if length and of == "features":
        raise InputError("--epochs and --lr are for --of weights: other paths have no epochs")
    _check_folds(folds, grid, model)

    from tikhon.cli.progress import StepProgress
    from tikhon.cli.results import conclude_saved
    from tikhon.cli.startup import limit_threads
    from tikhon.models import build as build_network
    from tikhon.paths.path import check_linear, path as follow
    from tikhon.runs.interrupt import Stopped, interruptible
    from tikhon.runs.run_directory import RunDirectory

    terminal = run.terminal()
    options, source, parts = tables.load_and_split(
        terminal, data, table, data_dir, test=test, seed=seed
    )
    folder_path = output_of(run.output, source.name, run.resume)
    limit_threads(0)
    train, valid = (parts.train.x, parts.train.y), (parts.valid.x, parts.valid.y)
    network = partial(build_network, model, parts.train.shape, source.outputs)
    build = None if model == "linear" else network
    settings: dict[str, Any] = {"strengths": grid, "select": select, "seed": seed}
    if build is None:
        train, valid = tables.all_but_test(parts), None
        check_linear(train, kinds[penalty](), strengths=grid, debias=debias)
        settings["folds"] = 0 if grid == "universal" else folds
    if build is None or of == "weights":
        settings |= {"debias": debias, "of": of, **length}
    terminal.note(
        f"{source.name}: {len(train[0]):,} rows, {train[0][0].numel()} features; "
        f"{penalty} path of model {model}"
    )
    if run.resume and complete_files(terminal, folder_path):
        return 0
    lacks_skip = penalty == "hierarchical" and not model.startswith("skip:")
    name = f"skip:{model}" if lacks_skip else model  # by which `build` makes it again
    about_model = about_network(name, parts, source.outputs)
    about = about_data(source, parts, tables.VALID, test, options, folds=build is None)
    config = config_of("path", folder_path, about, about_model, seed=seed)
    with RunDirectory(folder_path) as folder:
        folder.take(config, resume=run.resume, overwrite=run.overwrite)
        with interruptible() as interrupt, StepProgress(terminal) as on_step:
            try:
                result = follow(
                    build,
                    train,
                    kinds[penalty](),
                    valid=valid,
                    feature_names=parts.train.feature_names if of == "features" else (),
                    output=folder_path,
                    resume=run.resume,
                    stop=interrupt.__bool__,
                    on_progress=lambda share: on_step("solving", share, 1),
                    on_warning=lambda text: terminal.note(f"warning: {text}", "yellow"),
                    **settings,
                )
            except Stopped:
                kept = f"what is solved is kept in {folder_path}"
                return report_interruption(terminal, interrupt, config["command"], kept)
        document = _save(folder, result, parts, config)
        left_out = ("importances", "errors", "score_errors", "margins", "accuracies")
        conclude_saved(
            terminal, document, folder_path, ending=f"; model in {folder_path}", left_out=left_out
        )
    return 0


def _save(
    folder: RunDirectory,
    result: PathResult,
    parts: Any,
    config: dict[str, Any],
) -> dict[str, Any]:
    from tikhon.cli.results import suggest_predict
    from tikhon.report.kinds.path import selected
    from tikhon.runs.files import write_tensors
    from tikhon.runs.run_directory import MODEL, RESULT

    name, outputs = config["model"]["name"], config["model"]["outputs"]
    state = _state(result, outputs)
    write_tensors(folder.path / MODEL, state)
    document = result.to_dict() | _test_results(result, state, parts, name, outputs)
    entered = selected(document).items()
    document["features"] = {name: {"importance": w, "enters": s} for name, (w, s) in entered}
    document["next"] = suggest_predict(document, folder.path, config)
    folder.write(RESULT, document)
    return document


def _check_model(model: str | None, penalty: str, of: str) -> str:
    """Return the model of a path, after checking it."""
    if of == "weights":
        if model == "linear":
            raise InputError("--of weights is for networks: give a model such as mlp:64")
        return model or "mlp:64"
    model = model or ("mlp:64" if penalty == "hierarchical" else "linear")
    if model != "linear" and penalty not in _NETWORKS:
        raise InputError(
            f"a path of networks takes {' or '.join(_NETWORKS)}, received {penalty!r}"
        )
    if model.startswith("spline:"):
        plain = model.removeprefix("spline:")
        raise InputError(
            f"model {model!r} expands its inputs, so it cannot leave one out; use {plain!r}"
        )
    return model


def _check_folds(folds: int, grid: int | str | list[float], model: str) -> None:
    """Reject a linear path without a way to choose a strength."""
    several = grid != "universal" and grid != 1 and not (isinstance(grid, list) and len(grid) == 1)
    if model == "linear" and folds == 0 and several:
        raise InputError(
            "--folds 0 leaves no scores to choose a strength by: give 2 or more, one strength, "
            "or --strengths universal"
        )


def _state(result: PathResult, outputs: int) -> dict[str, Tensor]:
    """Return the chosen model as the state of the named network.

    One logit for two classes becomes two, the first of them 0. A class without training rows gets
    a logit that is never the largest.
    """
    import torch

    state = result.model().state_dict()
    if result.coefficients is None:
        return state
    weight, bias = state.values()
    if result.classes and len(bias) == 1:
        weight, bias = (torch.cat([torch.zeros_like(t), t]) for t in (weight, bias))
    if result.classes and len(bias) < outputs:
        seen = list(result.classes)
        every = torch.zeros(outputs, weight.shape[1]), torch.full((outputs,), -1e4)
        every[0][seen], every[1][seen] = weight, bias
        weight, bias = every
    return {"fc1.weight": weight, "fc1.bias": bias}


def _parse_strengths(text: str) -> int | str | list[float]:
    if text == "universal":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"strengths must be a number of strengths, a list such as 1,0.1,0.01 or universal, "
            f"received {text!r}"
        ) from None


def _test_results(
    result: PathResult, state: dict[str, Tensor], parts: Any, name: str, outputs: int
) -> dict[str, Any]:
    """Return test scores of the chosen model and its baselines, and of each strength."""
    from tikhon.cli.results import score_on_test_rows
    from tikhon.models import build

    chosen = build(name, parts.train.shape, outputs)
    chosen.load_state_dict(state)
    found = score_on_test_rows(chosen, tables.all_but_test(parts), parts.test)
    return {**found, "test_scores": _test_scores(result, parts.test)}


def _test_scores(result: PathResult, test: Any) -> list[float]:
    """Return accuracy, or rmse in the target's unit, of the model at each strength."""
    import torch

    from tikhon.training.losses import Kind
    from tikhon.training.measures import task_scores

    found = []
    for index in range(len(result.strengths)):
        model = result.model(index)
        with torch.no_grad():
            out = model(test.x.flatten(1) if isinstance(model, torch.nn.Linear) else test.x)
        single: Kind = "binary" if out.shape[1] == 1 else "classes"
        kind: Kind = "numbers" if test.y.is_floating_point() else single
        scores = task_scores(out, test.y, kind, test.unit)
        found.append(scores["rmse" if kind == "numbers" else "accuracy"])
    return found
