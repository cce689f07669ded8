"""tikhon diagnose: find out why a model does not train."""

from __future__ import annotations

import copy
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tikhon.cli import tables
from tikhon.cli.option_groups import flag
from tikhon.cli.options import OptionalOutput, Seed
from tikhon.errors import InputError, unknown_name
from tikhon.options import (
    DATA,
    LOSSES,
    MODELS,
    OPTIMIZERS,
    OUTPUT,
    REGULARIZATION,
    SOURCES,
    TRAINING,
)

if TYPE_CHECKING:
    from tikhon.cli.options import RunOptions
    from tikhon.cli.terminal import Terminal
    from tikhon.cures import Cure
    from tikhon.diagnosis import Diagnosis

DEFAULT_MODEL, DEFAULT_OPTIMIZER = "mlp", "adam:1e-3"  # those of tikhon fit

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="FILE.py:NAME, your module or a function that makes one; or a network of tikhon fit: "
        "mlp, linear, convnet, ... A data set or a table alone stands for mlp on it.",
    ),
]
DataOption = Annotated[
    str | None, flag("digits, mnist, ..., a file, or FILE.py:NAME.", DATA, "DATA", names=SOURCES)
]
ValidOption = Annotated[
    str | None,
    flag(
        "Data for validation; a named data set or a file is split if this is left out.",
        DATA,
        "DATA",
    ),
]
LossOption = Annotated[
    str,
    flag(
        "cross_entropy, bce, mse, half_mse, mae, ..., auto (by the target) or FILE.py:NAME.",
        TRAINING,
        "LOSS",
        names=LOSSES,
    ),
]
_optimizer = flag(
    "adam:1e-3, sgd:0.1,momentum=0.9, or FILE.py:NAME, called with the parameters.",
    TRAINING,
    "OPTIMIZER",
    names=OPTIMIZERS,
)
OptimizerOption = Annotated[str | None, _optimizer]
PenaltyOption = Annotated[
    str | None,
    flag(
        "Function of the model whose value is added to the loss.", REGULARIZATION, "FILE.py:NAME"
    ),
]
BatchSize = Annotated[int, flag("Rows per step.", TRAINING)]
Clip = Annotated[float | None, flag("Clip the norm of the gradient at X.", REGULARIZATION)]


def diagnose(
    model: Model,
    data: DataOption = None,
    loss: LossOption = "auto",
    optimizer: OptimizerOption = None,
    valid: ValidOption = None,
    steps: Annotated[int, flag("Steps of the dry run.", TRAINING)] = 200,
    batch_size: BatchSize = 64,
    penalty: PenaltyOption = None,
    clip: Clip = None,
    fail_on: Annotated[
        str | None,
        flag(
            "Exit with code 3 if a finding is this severe or more: info, warning or critical.",
            OUTPUT,
            "SEVERITY",
            names=("info", "warning", "critical"),
        ),
    ] = None,
    full: Annotated[bool, flag("Print all findings and layers.", OUTPUT)] = False,
    seed: Seed = 0,
    *,
    table: tables.Rows,
    run: OptionalOutput,
) -> int:
    """Find out why a model does not train; works on copies of it.

    A Python file is run. Without --optimizer nothing of it is trained: only the untrained model
    is checked. A network of tikhon fit is trained by adam:1e-3.
    """
    from tikhon.diagnosis import diagnose as examine
    from tikhon.diagnosis.findings import SEVERITIES
    from tikhon.diagnosis.text import format_full

    if fail_on is not None and fail_on not in SEVERITIES:
        raise InputError(f"--fail-on: {unknown_name('severity', fail_on, SEVERITIES)}")
    terminal = run.terminal()
    program = load_program(
        model, data, loss, optimizer, valid, penalty, table=table, seed=seed, terminal=terminal
    )
    found = examine(**program, steps=steps, batch_size=batch_size, seed=seed, clip=clip)
    terminal.print(format_full(found.record, found.findings) if full else str(found))
    save_and_print(terminal, run, found)
    limit = SEVERITIES.index(fail_on) if fail_on is not None else len(SEVERITIES)
    worst = max((SEVERITIES.index(f.severity) for f in found.findings), default=-1)
    return 3 if worst >= limit else 0


def save_and_print(terminal: Terminal, run: RunOptions, found: Diagnosis | Cure) -> None:
    """Save the result and its page if a folder was given; print the JSON document if requested."""
    from tikhon.cli.results import print_next
    from tikhon.report.document import build, write_page
    from tikhon.report.saved import SavedRun

    document = found.to_dict()
    if run.output is not None:
        found.save(run.output, overwrite=run.overwrite)
        file, page = write_page(run.output)
    else:
        saved = SavedRun(Path(document["kind"]), {"command": sys.argv}, (), document)
        file, page = None, build(saved)
    print_next(terminal, file, page.next_commands)
    terminal.print_document(document)


def load_program(
    model: str,
    data: str | None,
    loss: str,
    optimizer: str | None,
    valid: str | None,
    penalty: str | None,
    *,
    table: tables.TableArguments,
    seed: int,
    terminal: Terminal,
) -> dict[str, Any]:
    """Load the program named by the options."""
    import torch

    from tikhon.cli import user_objects
    from tikhon.cli.startup import limit_threads
    from tikhon.models import is_name

    limit_threads(0)
    torch.manual_seed(seed)
    if data is None:
        if user_objects.is_user_object(model):
            raise InputError(f"--data is needed: what {model} is trained on")
        model, data = DEFAULT_MODEL, model
    given = [spec for spec in (data, valid) if spec is not None]
    if (option := table.first_flag) and all(map(user_objects.is_user_object, given)):
        raise InputError(
            f"{option} is for a table, and {data} is an object of your own: leave it out"
        )
    # each source is read once
    split_of = cache(partial(user_objects.load_split, terminal, table=table, seed=seed))
    made: Any
    if is_name(model):
        made = user_objects.network_for(model, data, split_of)
        optimizer = optimizer or DEFAULT_OPTIMIZER
    elif ":" in model:
        made = user_objects.load_object(model, "MODEL", terminal)
    else:
        if model.endswith(".py"):
            raise InputError(f"MODEL: name what is in the file, such as {model}:make_model")
        raise InputError(f"MODEL: {unknown_name('network', model, MODELS)}, or FILE.py:NAME")
    if not callable(made):
        raise InputError(f"MODEL: {model} is a {type(made).__name__}, not a module or a function")

    @cache
    def copy_of_model() -> Any:
        return copy.deepcopy(made) if isinstance(made, torch.nn.Module) else made()

    load = partial(
        user_objects.load_data, terminal=terminal, split_of=split_of, model=copy_of_model
    )
    train, validation = load(data, "--data")
    if valid is not None:
        validation = load(valid, "--valid")[0]
    program: dict[str, object] = {
        "model": made,
        "data": train,
        "valid": validation,
        "loss": user_objects.parse_loss(loss, terminal),
        "optimizer": user_objects.parse_optimizer(optimizer, terminal)
        if optimizer is not None
        else None,
    }
    if penalty is not None:
        program["penalty"] = user_objects.load_object(penalty, "--penalty", terminal)
    return program
