"""Bind a local port and serve until Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from tikhon.errors import InputError, StorageError
from tikhon.live.application import application
from tikhon.live.connections import Connection
from tikhon.live.guard import Access
from tikhon.live.watched_run import WatchedRun

PORT = 8420
TRIES = 50  # ports tried after the first


def serve(
    run_dir: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    language: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Show a run in the browser while it runs; return when stopped.

    Args:
        run_dir: run folder, only read and not locked. If it has no run yet, the page waits.
        host: an address of this machine; any other than 127.0.0.1 or ::1 allows other machines,
            which still need the printed address.
        port: the first port to try.
        language: "en" or "zh"; by default that of the browser.
        say: called with each line to print, including the address.

    Raises `InputError` for a folder with other files or a host that is not an address of this
    machine, `StorageError` if no port is free.
    """
    run, access = WatchedRun(run_dir, language), Access()
    listener, port = bind(host, port)
    names = own_names(host)
    if not ipaddress.ip_address(host).is_loopback:
        say(f"warning: {host} can be reached from other machines; the address below is the key")
    if run.waits:
        say(f"waiting for a run in {run.path}")
    shown = f"[{host}]" if ":" in host else host
    if ipaddress.ip_address(host).is_unspecified:
        shown = sorted(names)[0]
    say(f"http://{shown}:{port}/?token={access.token}")
    config = uvicorn.Config(
        application(run, access, names),
        access_log=False,
        log_level="warning",
        http=Connection,
        timeout_graceful_shutdown=1,
        server_header=False,
        lifespan="off",
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> tuple[socket.socket, int]:
    """Return a socket listening on the first free port from `port`."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError as error:
        raise InputError(f"host must be an IP address such as 127.0.0.1, got {host!r}") from error
    if not 0 <= port <= 65535:
        raise InputError(f"port must be between 0 and 65535, got {port}")
    for candidate in range(port, min(port + TRIES, 65536)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(64)
        except OverflowError:
            listener.close()
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(f"{host} is not an address of this machine") from error
        else:
            return listener, listener.getsockname()[1]
    raise StorageError(f"no free port on {host} from {port} on; give another --port")


def own_names(host: str) -> frozenset[str]:
    """Return the host names allowed in requests."""
    address = ipaddress.ip_address(host)
    shown = f"[{address.compressed}]" if address.version == 6 else host
    if not address.is_unspecified:
        return frozenset({shown, "localhost"} if address.is_loopback else {shown})
    name = socket.gethostname()
    try:
        found = {where[0] for _, _, _, _, where in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    every = {f"[{a}]" if ":" in str(a) else str(a) for a in found}
    return frozenset({name.lower(), "127.0.0.1", "localhost", *every})
