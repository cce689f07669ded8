"""The options that several commands share, and the reading of their values."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tikhon.errors import InputError

# The panels of --help, in this order.
DATA, MODEL, REGULARIZATION = "Data", "Model", "Regularization"
TRAINING, OUTPUT = "Training", "Output"

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="digits, mnist, ..., a table with --target, or a file or folder of arrays.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", rich_help_panel=TRAINING)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=TRAINING)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder of the run.",
        metavar="RUN",
        show_default="runs/DATA-N",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON document.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="A line per epoch, with penalties and norms.",
        rich_help_panel=OUTPUT,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Stop after this time: 60s, 5m, 1h.", metavar="TIME", rich_help_panel=TRAINING
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder that holds the data's files.", metavar="DIR", rich_help_panel=DATA),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --output.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the run in --output.", rich_help_panel=OUTPUT),
]


def strength(text: str, option: str) -> float | str:
    """A strength: a finite number >= 0, or "auto".

    >>> strength("1e-4", "l1")
    0.0001
    """
    if text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 <= number < math.inf):
        raise InputError(
            f"{option}: the strength must be a finite number >= 0 or auto, received {text!r}"
        )
    return number


def penalty_entry(text: str) -> dict[str, Any]:
    """A recipe entry of PATTERN=NAME:STRENGTH[,KEY=VALUE...]; the pattern may be left out.

    >>> penalty_entry("fc1.weight=mcp:1e-3,gamma=3")
    {'pattern': 'fc1.weight', 'penalty': 'mcp', 'strength': 0.001, 'gamma': 3.0}
    """
    found = re.fullmatch(r"(?:([^=:]+)=)?([a-z0-9_]+)(?::([^,]+))?((?:,\w+=[^,]+)*)", text.strip())
    if not found:
        raise InputError(
            f"--penalty: [PATTERN=]NAME:STRENGTH[,KEY=VALUE] is needed, received {text!r}"
        )
    entry: dict[str, Any] = {"pattern": found[1] or "*", "penalty": found[2]}
    if found[3]:
        entry["strength"] = strength(found[3], f"--penalty {found[2]}")
    for setting in filter(None, found[4].split(",")):
        key, _, value = setting.partition("=")
        entry[key] = _value(value)
    return entry


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text
