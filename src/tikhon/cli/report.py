"""tikhon report: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli.options import Debug, Json, Quiet


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write RUN/report.html: one page, offline, that a team can pass around."""
    from tikhon import report as page
    from tikhon.cli.terminal import Terminal
    from tikhon.errors import InputError

    if not (run / "config.json").is_file():
        raise InputError(f"{run} is not the folder of a run: it has no config.json")
    path = page.write(run)
    terminal = Terminal(json=json, quiet=quiet)
    terminal.say(str(path))
    terminal.document({"report": str(path)})
