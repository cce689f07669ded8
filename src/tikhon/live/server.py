"""Binding a port of this machine and serving until Ctrl-C."""

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
from tikhon.live.watching import Watched

PORT = 8420
TRIES = 50  # ports after the first one


def serve(
    run_dir: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    language: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Show a run in the browser while it runs; returns when it is stopped.

    Args:
        run_dir: folder of a run; it is only read, without a lock. The page waits for a run that
            has not begun.
        host: an address of this machine; another one than 127.0.0.1 or ::1 lets others connect,
            who still need the printed address.
        port: the first port to try, the next free one is taken.
        language: "en" or "zh"; by default the browser's.
        say: called with the lines to show, the address among them.

    Raises `InputError` for a folder of other files or a host that is not an address of this
    machine, `StorageError` where no port is free.
    """
    run, access = Watched(run_dir, language), Access()
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
    """A listening socket on the first free port from `port` on."""
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
    """The names under which requests may come, exactly."""
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
