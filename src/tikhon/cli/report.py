"""tikhon report: the page of a run, or the comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli.option_groups import flag
from tikhon.cli.options import Language, PrintOptions
from tikhon.options import OUTPUT


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[
        Path | None,
        flag("File to write.", OUTPUT, "FILE", shown="RUN/report.html", flags=("--output", "-o")),
    ] = None,
    language: Language = None,
    open: Annotated[bool, flag("Open the page in the browser.", OUTPUT)] = False,
    *,
    shown: PrintOptions,
) -> None:
    """Write the report of a run, or of several runs compared, as one page that works offline.

    Several runs are compared where their data and their score are the same.
    """
    from tikhon.cli.results import english
    from tikhon.report.document import write_page

    path, page = write_page(*runs, output=output, language=language)
    terminal = shown.terminal()
    sentences = [english(sentence) for sentence in page.sentences]
    for sentence in sentences:
        terminal.note(sentence)
    terminal.print(str(path))
    if open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            terminal.note(f"no browser was found: open {path} in one")
    terminal.print_document({"report": str(path), "verdict": " ".join(sentences)})
