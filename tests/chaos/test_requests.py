"""Random requests to a live server on loopback: no answer without the key, none that breaks it."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest
from tally import Tally, count, rng

pytest.importorskip("uvicorn", reason="the extra `live` holds uvicorn")
import uvicorn

from sample_runs import fit_run
from tikhon.live import Access, application
from tikhon.live.connections import Connection
from tikhon.live.server import bind, own_names
from tikhon.live.watched_run import WatchedRun

METHODS = (
    b"GET",
    b"HEAD",
    b"POST",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"get",
    b"",
    b"\xff",
    b"G T",
)
PATHS = (
    b"/",
    b"/page.js",
    b"/events",
    b"/../config.json",
    b"//x",
    b"*",
    b"http://a/",
    b"/%00",
    b"/?token=x",
)
HOSTS = (
    b"127.0.0.1",
    b"localhost",
    b"evil.com",
    b"127.0.0.1:99999",
    b"[::1",
    b"",
    b"localhost\x00",
)
ORIGINS = (
    b"http://localhost",
    b"http://[",
    b"null",
    b"http://evil.com",
    b"\xff",
    b"",
    b"x" * 5_000,
)
HEADERS = (
    *(
        b"Cookie: a=b; =; \xff",
        b"Cookie: tikhon_live=1",
        b"Content-Length: 5",
        b"Content-Length: -1",
    ),
    *(b"Transfer-Encoding: chunked", b"Upgrade: websocket\r\nConnection: Upgrade", b" folded"),
    *(b"Expect: 100-continue", b"Range: bytes=0-", b"No colon", b"X: " + b"y" * 70_000),
    b"Connection: close",
)
VERSIONS = (b"HTTP/1.1", b"HTTP/1.1", b"HTTP/9", b"")


def request(draw: random.Random) -> bytes:
    """One request that may be anything."""
    head = [b" ".join(map(draw.choice, (METHODS, PATHS, VERSIONS)))]
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        head.append(b"Host: " + draw.choice(HOSTS))
    if draw.random() < 0.4:
        head.append(b"Origin: " + draw.choice(ORIGINS))
    head += draw.choices(HEADERS, k=draw.randint(0, 3))
    content = b"\r\n".join(head) + draw.choice((b"\r\n\r\n", b"\n\n", b"\r\n", b""))
    if draw.random() < 0.3:
        place = draw.randrange(len(content) + 1)
        content = content[:place] + draw.randbytes(draw.randint(1, 8)) + content[place:]
    return content + draw.choice((b"", b"", b"body", content))


@pytest.fixture
def server(tmp_path):
    """The port of a server in this process, its key, and what it complained of."""
    run, access, complaints = WatchedRun(fit_run(tmp_path / "run", epochs=3)), Access(), []
    guarded = application(run, access, own_names("127.0.0.1"))

    async def watched(scope, receive, send):
        try:
            await guarded(scope, receive, send)
        except Exception as error:
            complaints.append(f"{type(error).__name__}: {error}")
            raise

    listener, port = bind("127.0.0.1", 0)
    config = uvicorn.Config(watched, http=Connection, log_level="critical", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield port, access, complaints
    running.should_exit = True
    thread.join(20)
    listener.close()


def answer(port: int, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(content)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(1.0)
        found = b""
        try:
            while piece := raw.recv(65_536):
                found += piece
        except OSError:
            pass
    return found


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "spoilt", [b"GET / HTTP/1.1\r\n", b"\xff\r\n", b"-5\r\nhello\r\n", b"5\r\nhelloxx"]
)
def test_bytes_that_spoil_a_request_which_is_being_answered(server, method, spoilt):
    port, access, complaints = server
    head = f"{method} /?token={access.token} HTTP/1.1\r\nHost: localhost\r\n".encode()
    content = head + b"Transfer-Encoding: chunked\r\n\r\n" + spoilt
    assert answer(port, content).split(b" ", 2)[1] == b"400" and not complaints


@pytest.mark.timeout(36_000)
def test_random_requests(server):
    port, access, complaints = server
    draw, tally = rng("requests"), Tally("random requests")
    for _ in range(count(80, 5_000)):
        content = request(draw)
        try:
            found = answer(port, content)
        except OSError:
            found = b""
        status = found.split(b" ", 2)[1:2]
        outcome = "noticed"
        if complaints:
            outcome = complaints.pop()
        elif b"schema_version" in found or status in ([b"200"], [b"500"]):
            outcome = f"answered {found[:200]!r}"
        elif status in ([b"403"], [b"405"], [b"303"]) and b"content-security" not in found:
            outcome = f"without the headers: {found[:200]!r}"
        tally.add(outcome, repr(content[:300]))
    key = f"GET /?token={access.token} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    began = time.monotonic()
    assert answer(port, key.encode()).startswith(b"HTTP/1.1 303")  # the owner still comes in
    assert time.monotonic() - began < 5
    tally.close()
