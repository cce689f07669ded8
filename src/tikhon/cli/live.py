"""tikhon live: a running fit or search in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli.option_groups import flag
from tikhon.cli.options import Language, QuietOptions
from tikhon.options import OUTPUT


def live(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    host: Annotated[str, flag("Address to listen on.", OUTPUT, "HOST")] = "127.0.0.1",
    port: Annotated[int, flag("First port to try.", OUTPUT)] = 8420,
    language: Language = None,
    *,
    shown: QuietOptions,
) -> None:
    """Show a run in the browser while it trains: read-only, on this machine."""
    from tikhon.errors import InputError

    try:
        from tikhon.live import serve
    except ImportError as error:
        raise InputError(f"tikhon live needs {error.name}: pip install 'tikhon[live]'") from error
    terminal = shown.terminal()
    terminal.note("Ctrl-C stops the page, not the run.")
    serve(run, host=host, port=port, language=language, say=terminal.print)
