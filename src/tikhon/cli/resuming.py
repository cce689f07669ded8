"""Complete a run killed at its end, and explain how to resume an interrupted one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tikhon.errors import InputError, StorageError

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal
    from tikhon.runs.interrupt import Interrupt


def complete_files(terminal: Terminal, path: Path) -> bool:
    """Write the remaining files of a run that already has its result.

    Returns False if more is missing, or nothing but what a kill at the end has left to remove.
    """
    from tikhon.report.document import write_page
    from tikhon.runs.interrupt import REQUESTED
    from tikhon.runs.run_directory import REPORT, RESULT, RunDirectory

    with RunDirectory(path) as folder:
        if not (path / RESULT).exists():
            return False
        if folder.is_finished and (path / REPORT).exists():
            # unless another process holds it, or nothing can be written
            with suppress(InputError, StorageError):
                folder.lock()
            return False
        result = folder.read(RESULT)
        if result.get("stopped") == REQUESTED:
            return False
        folder.lock()
        page, _ = write_page(path)
        folder.finish()
    terminal.print(f"the work had ended; what was missing is written now\nreport: {page}")
    terminal.print_document({"output": str(path), **result})
    return True


def report_interruption(
    terminal: Terminal, interrupt: Interrupt, command: Sequence[str], kept: str
) -> int:
    """Print what was kept and how to continue; return the exit code."""
    again = shlex.join([*command, "--resume"])
    terminal.note(f"stopped; {kept}; continue with\n  {again}")
    return 128 + int(interrupt.signal or 0)
