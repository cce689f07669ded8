"""A child of the warm test process: a fork saves the seconds that importing torch costs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def fork(action: Callable[[], int], out: Path, err: Path) -> int:
    """Run `action`, which gives the exit code, with its output in two files; the child's id."""
    for path in (out, err):
        path.touch()  # the child may be killed before it opens them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads; the child is ours
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = action()
    except KeyboardInterrupt:  # before a command has begun, or after it
        code = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
