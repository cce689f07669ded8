"""A script run by two processes that talk over gloo, as by torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 240.0


def together(script: Path) -> str:
    """What rank 0 printed; AssertionError with what was said if a rank failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = _ends([_started(script, rank, port, folder) for rank in range(2)])
        said = "\n".join((folder / f"{rank}.err").read_text()[-3000:] for rank in range(2))
        assert codes == [0, 0], f"exit codes {codes}\n{said}"
        return (folder / "0.out").read_text()


def _started(script: Path, rank: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    own |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, str(script)], env=os.environ | own, stdout=out, stderr=err
        )


def _ends(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes; where one fails or time is over the others are killed."""
    until = time.monotonic() + SECONDS
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() > until or any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.wait() for rank in ranks]
