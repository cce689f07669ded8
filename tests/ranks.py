"""A script run by two forked processes that talk over gloo, as by torchrun."""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path

from forks import fork

SECONDS = 240.0
ENDED: list[dict[str, object]] = []  # a script's objects: destructors may wait for gloo's threads


def together(script: Path) -> str:
    """What rank 0 printed; AssertionError with what was said if a rank failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            fork(
                lambda rank=rank: _run(script, rank, port),
                folder / f"{rank}.out",
                folder / f"{rank}.err",
            )
            for rank in range(2)
        ]
        codes = _ends(ranks)
        said = "\n".join((folder / f"{rank}.err").read_text()[-3000:] for rank in range(2))
        assert codes == [0, 0], f"exit codes {codes}\n{said}"
        return (folder / "0.out").read_text()


def _run(script: Path, rank: int, port: int) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    warnings.resetwarnings()  # those of a process of its own
    sys.argv, sys.path = [str(script)], [str(script.parent), *sys.path]
    faulthandler.dump_traceback_later(SECONDS - 10.0)  # where a rank that never ends stands
    ENDED.append(runpy.run_path(str(script), run_name="__main__"))
    return 0


def _ends(ranks: list[int]) -> list[int]:
    """The exit codes; where one fails or time is over the others are killed."""
    until, codes = time.monotonic() + SECONDS, dict[int, int]()
    while len(codes) < len(ranks):
        for rank in ranks:
            if rank not in codes and (ended := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() > until or any(codes.values()):
            for rank in set(ranks) - set(codes):
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[rank] for rank in ranks]
