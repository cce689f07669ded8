"""What leaves a command: through a pipe that closes, in any encoding, into a narrow window."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tikhon.cli.terminal import Terminal

SHORT = ["fit", "breast_cancer", "--epochs", "1", "-q", "--no-linear", "--output"]


def no_reader() -> None:
    """What `| head -0` leaves of stdout."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def test_a_reader_that_leaves_ends_the_command_as_a_pipe_does(command, tmp_path: Path):
    """rich ends it with 1 otherwise, which is the code of an error that nobody expected."""
    done = command.run(*SHORT, tmp_path / "run", cwd=tmp_path, before=no_reader)
    assert done.code == 128 + signal.SIGPIPE and not done.err
    assert (tmp_path / "run" / "report.html").exists()


def in_an_encoding(name: str) -> Callable[[], None]:
    """What `PYTHONIOENCODING` does to a new process."""

    def begin() -> None:
        sys.stdout.reconfigure(encoding=name, errors="strict")  # type: ignore[union-attr]

    return begin


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stream_that_lacks_letters_gets_question_marks(command, tmp_path: Path, encoding: str):
    folder = tmp_path / "\u4e2d" / "run"
    done = command.run(*SHORT, folder, cwd=tmp_path, before=in_an_encoding(encoding))
    assert done.code == 0, done.err
    assert "report: " in done.out and "/?/run/report.html" in done.out


def test_json_loses_no_letter(command, tmp_path: Path):
    folder = tmp_path / "\u4e2d" / "run"
    done = command.run(*SHORT, folder, "--json", cwd=tmp_path, before=in_an_encoding("ascii"))
    assert json.loads(done.out)["output"] == str(folder)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_numbers_are_never_cut(width: int, capsys: pytest.CaptureFixture[str]):
    terminal = Terminal()
    terminal.out.width = width
    numbers = [["123,456", "0.987", "1,234.5"], ["7.65e-05", "-31.8", "99.99%"]]
    rows = [["Always the mean, validation", *numbers[0]], ["Training", *numbers[1]]]
    terminal.table(["Rows", "RMSE", "R2", "Balanced accuracy"], rows)
    shown = capsys.readouterr().out.split()
    assert [cell for row in numbers for cell in row if cell not in shown] == []
