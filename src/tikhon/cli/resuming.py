"""Starting the folder of a run, taking up an interrupted one, and saying how to."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tikhon.errors import InputError

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal
    from tikhon.runs.interrupt import Interrupt
    from tikhon.runs.run_directory import RunDirectory


def take(
    folder: RunDirectory, config: Mapping[str, object], *, resume: bool, overwrite: bool
) -> None:
    """Hold a new folder with its configuration, or the unfinished run that is in it.

    Raises `InputError` where there is nothing to resume, or a run of another configuration.
    """
    from tikhon.runs.run_directory import CONFIG, same_configuration

    if not resume:
        folder.create(overwrite=overwrite)
        folder.write(CONFIG, config)
        return
    if not folder.exists:
        raise InputError(f"nothing to resume: {folder.path} holds no run")
    if folder.is_finished:
        raise InputError(f"the run in {folder.path} is finished; replace it with --overwrite")
    same_configuration(folder.read(CONFIG), config)
    folder.lock()


def completed(terminal: Terminal, path: Path) -> bool:
    """Write what a killed process had still to write of a run that has its result.

    False where there is more to do than that, or nothing.
    """
    from tikhon.cli.conclusion import write
    from tikhon.runs.interrupt import REQUESTED
    from tikhon.runs.run_directory import REPORT, RESULT, RunDirectory

    with RunDirectory(path) as folder:
        there = (path / RESULT).exists()
        if not there or (folder.is_finished and (path / REPORT).exists()):
            return False
        result = folder.read(RESULT)
        if result.get("stopped") == REQUESTED:
            return False
        folder.lock()
        page = write(path)
        folder.finish()
    terminal.say(f"the work had ended; what was missing is written now\nreport: {page}")
    terminal.document({"output": str(path), **result})
    return True


def interrupted(
    terminal: Terminal, interrupt: Interrupt, command: Sequence[str], kept: str
) -> int:
    """Say what is kept and how to go on; the exit code."""
    again = shlex.join([*command, "--resume"])
    terminal.note(f"stopped; {kept}; continue with\n  {again}")
    return 128 + int(interrupt.signal or 0)
