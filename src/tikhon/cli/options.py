"""Options shared by several commands, and parsing of their values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tikhon.cli.option_groups import completion, flag, given_options, option_group, typer_option
from tikhon.errors import InputError
from tikhon.options import (
    DATA,
    OUTPUT,
    REGULARIZATION,
    SOURCES,
    STRENGTHS,
    Option,
    RecipeOptions,
    TrainingOptions,
    option,
    options_of,
)

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="digits, mnist, ..., a table with --target, or a file or folder of arrays.",
        autocompletion=completion(SOURCES),
    ),
]
DataDir = Annotated[Path | None, flag("Folder to look for DATA in.", DATA, "DIR")]
Language = Annotated[
    str | None,
    flag(
        "Language shown at first: en or zh.",
        OUTPUT,
        "NAME",
        shown="the browser's",
        names=("en", "zh"),
    ),
]
TestShare = Annotated[float, flag("Share of the rows for testing.", DATA)]
_training = {
    name: typer_option(option) for name, (option, _) in options_of(TrainingOptions).items()
}
Seed = Annotated[int, _training["seed"]]
Device = Annotated[str, _training["device"]]
Budget = Annotated[str | None, _training["budget"]]
BatchSize = Annotated[int, _training["batch_size"]]


@dataclass(frozen=True)
class RunOptions:
    """Where to keep a run, and what to print."""

    output: Path | None = option(
        None,
        "Folder of the run.",
        Path,
        OUTPUT,
        flags=("--output", "-o"),
        metavar="RUN",
        shown="runs/DATA-N",
    )
    resume: bool = option(False, "Continue the run in --output.", bool, OUTPUT)
    overwrite: bool = option(False, "Replace the run in --output.", bool, OUTPUT)
    json: bool = option(False, "Print the result as one JSON document.", bool, OUTPUT)
    quiet: bool = option(False, "Print no progress.", bool, OUTPUT, flags=("--quiet", "-q"))
    verbose: bool = option(
        False,
        "Print a line per epoch, with penalties and norms.",
        bool,
        OUTPUT,
        flags=("--verbose", "-v"),
    )
    debug: bool = option(False, "Show the traceback of an error.", bool, OUTPUT)

    def terminal(self) -> Terminal:
        """Return the terminal with the requested output."""
        from tikhon.cli.terminal import Terminal

        return Terminal(json=self.json, quiet=self.quiet)


@dataclass(frozen=True)
class _OptionalRunOptions(RunOptions):
    """A run kept only if a folder is given."""

    output: Path | None = option(
        None,
        "Folder to keep the result and its page in.",
        Path,
        OUTPUT,
        flags=("--output", "-o"),
        metavar="RUN",
        shown="not kept",
    )


Output = Annotated[RunOptions, option_group(RunOptions)]  # for long trainings
Resumable = Annotated[RunOptions, option_group(RunOptions, without=("verbose",))]
OptionalOutput = Annotated[
    RunOptions, option_group(_OptionalRunOptions, without=("resume", "verbose"))
]
_without_folder = ("output", "resume", "overwrite", "verbose")
PrintOptions = Annotated[RunOptions, option_group(RunOptions, without=_without_folder)]
QuietOptions = Annotated[RunOptions, option_group(RunOptions, without=(*_without_folder, "json"))]

GivenOptions = Mapping[str, Any]  # the options given in a group
Strengths = Annotated[
    GivenOptions,
    given_options(
        {
            name: Option(
                f"{option.help} on all weight matrices, or auto.",
                panel=REGULARIZATION,
                metavar="S",
                shown="off",
            )
            for name, option in STRENGTHS.items()
            if option.flag
        }
    ),
]
_recipe = {name: option for name, (option, _) in options_of(RecipeOptions).items()}
Penalties = Annotated[list[str] | None, typer_option(_recipe.pop("penalties"))]
RecipeGiven = Annotated[GivenOptions, given_options(_recipe)]


def parse_strength(text: str, option: str) -> float | str:
    """Parse a strength: a finite number >= 0, or "auto".

    >>> parse_strength("1e-4", "l1")
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


_PENALTY = re.compile(
    r"(?:(?P<pattern>[^=:]+)=)?(?P<name>[a-z0-9_]+)(?::(?P<strength>[^,]+))?"
    r"(?P<settings>(?:,\w+=[^,]+)*)"
)


def parse_penalty(text: str) -> dict[str, object]:
    """Parse a penalty PATTERN=NAME:STRENGTH[,KEY=VALUE...] with optional pattern.

    >>> parse_penalty("fc1.weight=mcp:1e-3,gamma=3")
    {'pattern': 'fc1.weight', 'penalty': 'mcp', 'strength': 0.001, 'gamma': 3.0}
    """
    found = _PENALTY.fullmatch(text.strip())
    if not found:
        raise InputError(
            f"--penalty: [PATTERN=]NAME:STRENGTH[,KEY=VALUE] is needed, received {text!r}"
        )
    name = found["name"]
    entry: dict[str, object] = {"pattern": found["pattern"] or "*", "penalty": name}
    if found["strength"]:
        entry["strength"] = parse_strength(found["strength"], f"--penalty {name}")
    for setting in filter(None, found["settings"].split(",")):
        key, _, value = setting.partition("=")
        entry[key] = _parse_setting(value)
    return entry


def _parse_setting(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text
