"""tikhon report: the page of a run, or the comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli.options import Debug, Json, Quiet


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The file.", metavar="FILE", show_default="RUN/report.html"),
    ] = None,
    language: Annotated[str, typer.Option(help="Shown at first: en or zh.")] = "en",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one page, offline, that a team can pass around; several runs are compared."""
    from tikhon import report as page
    from tikhon.cli.terminal import Terminal
    from tikhon.errors import InputError

    for run in runs:
        if not (run / "config.json").is_file():
            raise InputError(f"{run} is not the folder of a run: it has no config.json")
    path = page.write(*runs, output=output, language=language)
    terminal = Terminal(json=json, quiet=quiet)
    terminal.say(str(path))
    terminal.document({"report": str(path)})
