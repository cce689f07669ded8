"""The command line in a forked process of its own; signals and exit codes are the real ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from forks import fork


@dataclass
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


class Tikhon:
    """`tikhon ARGUMENTS` in a child process, in the folder `cwd`."""

    def __init__(self, arguments: list[str], cwd: Path, *, before=lambda: None) -> None:
        self.cwd = cwd
        self._streams = [cwd / ".stdout", cwd / ".stderr"]
        self.pid = fork(lambda: self._become(arguments, before), *self._streams)

    def _become(self, arguments, before) -> int:
        os.chdir(self.cwd)
        sys.argv = ["tikhon", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        from tikhon.cli import main

        return main(arguments)

    def wait(self, timeout: float = 60.0) -> Finished:
        """Its exit code (negative for an unhandled signal) and what it printed."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(self._streams[1].read_text())
            time.sleep(0.02)
        out, err = (path.read_text(errors="replace") for path in self._streams)
        for path in self._streams:
            path.unlink()
        return Finished(os.waitstatus_to_exitcode(status), out, err)

    def until(self, condition, timeout: float = 60.0) -> None:
        """Wait until `condition()` holds while the command runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self._streams[1].read_text()
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


def tikhon(*arguments: str, cwd: Path, before=lambda: None) -> Finished:
    """Run a command to its end."""
    return Tikhon([str(a) for a in arguments], cwd, before=before).wait()
