"""tikhon cure: find a change that makes a model train, and prove it."""

from __future__ import annotations

from typing import Annotated

from tikhon.cli import tables
from tikhon.cli.diagnose import (
    BatchSize,
    Clip,
    DataOption,
    LossOption,
    Model,
    OptimizerOption,
    PenaltyOption,
    ValidOption,
    load_program,
    save_and_print,
)
from tikhon.cli.option_groups import flag
from tikhon.cli.options import OptionalOutput, Seed
from tikhon.errors import InputError
from tikhon.options import TRAINING


def cure(
    model: Model,
    data: DataOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = "auto",
    valid: ValidOption = None,
    budget: Annotated[str, flag("Wall time in all, such as 60s or 2m.", TRAINING, "TIME")] = "60s",
    seeds: Annotated[int, flag("Seeds that each treatment runs with.", TRAINING)] = 3,
    steps: Annotated[int, flag("Steps of the longest runs.", TRAINING)] = 300,
    batch_size: BatchSize = 64,
    penalty: PenaltyOption = None,
    clip: Clip = None,
    seed: Seed = 0,
    *,
    table: tables.Rows,
    run: OptionalOutput,
) -> int:
    """Find a change that makes a model train, tested on copies of it.

    Each treatment is compared with no change, with the same seeds. The exit code is 3 if none did
    better with every seed.
    """
    from tikhon.cli.progress import StepProgress
    from tikhon.cures import cure as search

    terminal = run.terminal()
    program = load_program(
        model, data, loss, optimizer, valid, penalty, table=table, seed=seed, terminal=terminal
    )
    if program["optimizer"] is None:
        raise InputError(f"--optimizer is needed: what trains {model}, such as adam:1e-3")
    terminal.note(f"trying treatments for up to {budget}")
    with StepProgress(terminal) as progress:
        found = search(
            **program,
            seeds=seeds,
            steps=steps,
            budget=budget,
            batch_size=batch_size,
            seed=seed,
            clip=clip,
            on_progress=progress,
        )
    terminal.print(str(found.diagnosis))
    terminal.print(str(found))
    save_and_print(terminal, run, found)
    return 0 if found.confirmed or found.diagnosis.ok else 3
