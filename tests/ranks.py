"""A script run by two processes that talk over gloo, as by torchrun.

They are forked from the test process, which spares three imports of torch.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

SECONDS = 240.0


def together(script: Path) -> str:
    """What rank 0 printed; AssertionError with what was said if a rank failed."""
    import torch.distributed.fsdp  # noqa: F401  # once, for all children

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [_forked(script, rank, port, folder) for rank in range(2)]
        codes = _ends(children)
        said = "\n".join((folder / f"{rank}.err").read_text()[-3000:] for rank in range(2))
        assert codes == [0, 0], said
        return (folder / "0.out").read_text()


def _forked(script: Path, rank: int, port: int, folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads; the child is ours
        child = os.fork()
    if child == 0:
        _become(script, rank, port, folder)
    return child


def _become(script: Path, rank: int, port: int, folder: Path) -> NoReturn:
    code = 1
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        warnings.resetwarnings()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ends(children: list[int]) -> list[int]:
    """The exit codes; where one fails or time is over the others are killed."""
    until, codes = time.monotonic() + SECONDS, dict.fromkeys(children, -1)
    left = list(children)
    while left:
        for child in list(left):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                left.remove(child)
                codes[child] = os.waitstatus_to_exitcode(status)
        failed = any(codes[child] for child in children if child not in left)
        if left and (failed or time.monotonic() > until):
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return list(codes.values())
