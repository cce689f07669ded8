from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

from forks import fork
from sample_runs import fit_run

pytest.importorskip("uvicorn", reason="the extra `live` holds uvicorn")
import anyio
import httpx2 as httpx

from tikhon.errors import InputError, StorageError
from tikhon.live import connections
from tikhon.live.application import stream_changes
from tikhon.live.server import TRIES, bind, serve
from tikhon.live.watched_run import WatchedRun, thin_history
from tikhon.report.saved import read

NAME = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture
def running(tmp_path):
    """A run that has not finished, with hostile names, and the address that shows it."""
    run = fit_run(tmp_path / "run", epochs=4)
    (run / "result.json").unlink()
    history = run / "history.jsonl"
    history.write_text(history.read_text().replace("penalty/l1/", f"penalty/{NAME}/"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    child = fork(lambda: serving(run, port), out, tmp_path / "err")
    while not (out.exists() and "\n" in out.read_text()):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "err").read_text()
        time.sleep(0.02)
    yield run, out.read_text().splitlines()[0].strip()
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)


def serving(run, port) -> int:
    connections.REQUEST_SECONDS = 1.5
    serve(str(run), port=port, say=lambda text: print(text, flush=True))
    return 0


@pytest.mark.browser
def test_a_running_fit_in_the_browser(tab, running):
    run, address = running
    tab.open(address, ready="document.documentElement.dataset.charts !== undefined")
    assert "token" not in tab.run("location.href")
    tab.wait("document.querySelector('h1').innerText.includes('4 epochs so far')")
    tab.wait("/Updated [0-9]+ s ago/.test(document.querySelector('.hero').innerText)")
    assert tab.run("document.querySelectorAll('img').length") == 0
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps({**last, "epoch": 5, "valid/accuracy": 0.123}) + "\n")
    tab.wait("document.querySelector('h1').innerText.includes('5 epochs so far')")
    points = "document.querySelector('.chart').data[0]"
    assert tab.run(f"[{points}.x.length, {points}.y[4]]") == [5, 0.123]
    tab.click("[data-switch=zh]")
    tab.wait("document.querySelector('h2').innerText === '得分'")
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps({**last, "epoch": 6, "train/loss": None}) + '\n{"epoch": 7, "tr')
    tab.wait("document.body.innerText.includes('训练在第 6 轮发散')")
    assert tab.run("document.documentElement.dataset.language") == "zh"
    assert tab.run("document.querySelectorAll('img').length") == 0
    assert tab.complaints == []
    origin = address.split("?")[0]
    assert all(url.startswith(origin) for url in tab.requests)


def test_many_requests_and_a_slow_reader(running):
    _, address = running
    with httpx.Client(follow_redirects=True, timeout=20) as client:
        assert client.get(address).status_code == 200
        base = address.split("/?")[0]
        with client.stream("GET", f"{base}/events") as slow:
            codes = {client.get(base).status_code for _ in range(50)}
            assert codes == {200}
            assert client.get(base, params={"q": "x" * 60_000}).status_code in (200, 400, 414, 431)
            assert "changed" in next(slow.iter_text())
        assert client.get(base).status_code == 200


PATHS = (
    b"/../config.json", b"/%2e%2e/config.json", b"/%252e%252e/config.json", b"/config.json",
    b"/model.safetensors", b"/page.css/../../saved.py", b"/page.css;x", b"/page.js%00",
    b"/page.js\x00", b"//page.js", b"/static/page.js", b"/..\\config.json", b"/etc/passwd",
    b"//etc/passwd", b"/page.js/", b"/events/..", b"/\xff", b"config.json",
    b"http://evil.com/config.json",
)  # fmt: skip


def port_of(address):
    return int(address.split(":")[2].split("/")[0])


@pytest.mark.parametrize("head", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n"])
def test_connections_that_never_ask_do_not_keep_the_owner_out(running, head):
    _, address = running
    opened = []
    try:
        for _ in range(130):
            opened.append(socket.create_connection(("127.0.0.1", port_of(address)), timeout=20))
            opened[-1].sendall(head)
        with httpx.Client(follow_redirects=True, timeout=20) as client:
            assert client.get(address).status_code == 200
    finally:
        for raw in opened:
            raw.close()


def test_a_request_that_comes_drop_by_drop_is_cut_off(running):
    _, address = running
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port_of(address)), timeout=20) as raw:
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                raw.sendall(b"G" if time.monotonic() - began < 0.1 else b"x")
                time.sleep(0.1)
    assert 1.2 < time.monotonic() - began < 15


def test_events_last_longer_than_a_request_may_take(running):
    run, address = running
    with httpx.Client(follow_redirects=True, timeout=20) as client:
        client.get(address)
        with client.stream("GET", f"{address.split('/?')[0]}/events") as events:
            told = events.iter_text()
            assert "changed" in next(told)
            time.sleep(2)
            (run / "config.json").write_text((run / "config.json").read_text() + " ")
            assert "changed" in next(text for text in told if "event:" in text)


def test_there_are_no_other_addresses(running):
    _, address = running
    with httpx.Client(follow_redirects=True) as client:
        client.get(address)
        cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items()).encode()
    port = int(address.split(":")[2].split("/")[0])
    for path in PATHS:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            head = b"GET %s HTTP/1.1\r\nHost: localhost\r\nCookie: %s\r\nConnection: close\r\n\r\n"
            raw.sendall(head % (path, cookie))
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.split()[1] in (b"400", b"404", b"307"), path
        assert b"schema_version" not in answer and b"root:" not in answer


def test_watching_takes_no_lock_and_changes_nothing(tmp_path):
    run = fit_run(tmp_path / "run", epochs=3)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()}
    watched = WatchedRun(run)
    page = watched.page()
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()} == before
    assert watched.page() is page  # rendered once for all who look
    (run / "result.json").write_text("{ torn")
    assert watched.page() is page
    (run / "result.json").unlink()
    assert "has not finished" in watched.page()


def test_events_come_when_files_change(tmp_path):
    run = fit_run(tmp_path / "run", epochs=3)
    watched, seen = WatchedRun(run), []

    async def look():
        with anyio.fail_after(20):
            async for event in stream_changes(watched, every=0.01):
                seen.append(float(event["data"]))
                if len(seen) == 2:
                    return
                (run / "history.jsonl").open("a").close()
                (run / "config.json").write_text((run / "config.json").read_text() + " ")

    anyio.run(look)
    assert all(0 <= age < 600 for age in seen)


def test_long_histories_are_thinned(tmp_path):
    run = fit_run(tmp_path / "run", epochs=3)
    record = json.loads((run / "history.jsonl").read_text().splitlines()[0])
    rows = [
        {**record, "epoch": e, "train/loss": None if e == 4325 else 1.0} for e in range(1, 9001)
    ]
    (run / "history.jsonl").write_text("\n".join(map(json.dumps, rows)))
    short = thin_history(read(run))
    assert len(short.history) <= 1002
    assert short.history[-1]["epoch"] == 9000
    assert any(r["epoch"] == 4325 for r in short.history)
    start = time.process_time()
    assert "diverged in epoch 4325" in WatchedRun(run).page()
    assert time.process_time() - start < 10


def test_the_next_free_port():
    first, port = bind("127.0.0.1", 0)
    with first:
        second, other = bind("127.0.0.1", port)
        with second:
            assert port < other <= port + TRIES


def test_addresses_that_cannot_be_served(tmp_path):
    with pytest.raises(InputError, match="must be an IP address"):
        bind("localhost.evil.com", 0)
    with pytest.raises(InputError, match="not an address of this machine"):
        bind("192.0.2.1", 0)
    with pytest.raises(InputError, match="between 0 and 65535"):
        bind("127.0.0.1", 70_000)
    taken, port = bind("127.0.0.1", 65_535)
    with taken, pytest.raises(StorageError, match="no free port"):
        assert port == 65_535
        bind("127.0.0.1", 65_535)
    (tmp_path / "notes.txt").write_text("not a run")
    for other in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="run directory"):
            WatchedRun(other)


def test_a_run_that_has_not_begun_is_waited_for(tmp_path):
    watched = WatchedRun(tmp_path / "later")
    assert watched.waits and watched.age() == 0
    assert "Waiting for the run to begin" in watched.page()
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / ".lock").touch()
    assert "Waiting for the run to begin" in watched.page()
    run = fit_run(tmp_path / "later", epochs=3)
    finished = watched.page()
    assert not watched.waits and "data-age" not in finished
    assert "no network requests" not in finished  # that is true of the file alone
    (run / "result.json").unlink()
    assert "3 epochs so far" in watched.page() and "data-age" in watched.page()
    assert 0 <= watched.age() < 600
