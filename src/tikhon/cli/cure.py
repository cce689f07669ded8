"""tikhon cure: find a change that makes a model train, and prove it."""

from __future__ import annotations

from typing import Annotated

import typer

from tikhon.cli.diagnose import (
    BatchSize,
    Clip,
    DataOption,
    LossOption,
    Model,
    PenaltyOption,
    TargetOption,
    ValidOption,
    conclude,
    read,
)
from tikhon.cli.options import Plain, Seed


def cure(
    model: Model,
    data: DataOption,
    optimizer: Annotated[
        str,
        typer.Option(help="adam:1e-3, sgd:0.1,momentum=0.9 or FILE.py:NAME(parameters)."),
    ],
    loss: LossOption = "cross_entropy",
    valid: ValidOption = None,
    target: TargetOption = None,
    budget: Annotated[str, typer.Option(help="Time in all: 60s, 2m.", metavar="TIME")] = "60s",
    seeds: Annotated[int, typer.Option(help="Paired repetitions.")] = 3,
    steps: Annotated[int, typer.Option(help="Length of the last rung.")] = 300,
    batch_size: BatchSize = 64,
    penalty: PenaltyOption = None,
    clip: Clip = None,
    seed: Seed = 0,
    *,
    run: Plain,
) -> int:
    """Diagnose the model of a Python file and try treatments on copies, against doing nothing.

    Exit code 3 says that no treatment beat doing nothing with every seed.
    """
    from tikhon.cli.progress import StepProgress
    from tikhon.cures import cure as search

    terminal = run.terminal()
    program = read(
        model, data, loss, optimizer, valid, penalty, target=target, seed=seed, terminal=terminal
    )
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
    terminal.say(str(found.diagnosis))
    terminal.say(str(found))
    conclude(terminal, run, found)
    return 0 if found.confirmed or found.diagnosis.ok else 3
