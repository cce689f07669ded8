"""tikhon live: a running fit or search in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli.groups import suggested
from tikhon.cli.options import Silent
from tikhon.options import OUTPUT


def live(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    host: Annotated[
        str,
        typer.Option(help="Address to listen on.", metavar="HOST", rich_help_panel=OUTPUT),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="First port to try.", rich_help_panel=OUTPUT)] = 8420,
    language: Annotated[
        str | None,
        typer.Option(
            help="Language shown at first: en or zh.",
            metavar="NAME",
            show_default="the browser's",
            rich_help_panel=OUTPUT,
            autocompletion=suggested(("en", "zh")),
        ),
    ] = None,
    *,
    shown: Silent,
) -> None:
    """Show a run in the browser while it trains: read-only, on this machine."""
    from tikhon.errors import InputError

    try:
        from tikhon.live import serve
    except ImportError as error:
        raise InputError(f"tikhon live needs {error.name}: pip install 'tikhon[live]'") from error
    terminal = shown.terminal()
    terminal.note("Ctrl-C stops the page, not the run.")
    serve(run, host=host, port=port, language=language, say=terminal.say)
