from __future__ import annotations

import pytest

from sample_runs import fit_run

httpx = pytest.importorskip("httpx2", reason="the extra `dev` holds httpx2")
pytest.importorskip("starlette", reason="the extra `live` holds starlette")
from starlette.testclient import TestClient  # noqa: E402

from tikhon.live import Access, application  # noqa: E402
from tikhon.live.application import ASSETS  # noqa: E402
from tikhon.live.guard import HEADERS  # noqa: E402
from tikhon.live.server import own_names  # noqa: E402
from tikhon.live.watched_run import WatchedRun  # noqa: E402

ADDRESSES = ["/", *ASSETS]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return WatchedRun(fit_run(tmp_path_factory.mktemp("live") / "run", epochs=3))


@pytest.fixture
def access():
    return Access()


@pytest.fixture
def client(watched, access):
    app = application(watched, access, own_names("127.0.0.1"))
    return TestClient(app, base_url="http://127.0.0.1:8420", follow_redirects=False)


@pytest.fixture
def inside(client, access):
    assert client.get("/", params={"token": access.token}).status_code == 303
    return client


def test_the_printed_address_opens_until_the_end(client, access):
    token = access.token
    first = client.get("/", params={"token": token})
    assert (first.status_code, first.headers["location"]) == (303, "/")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and token not in cookie
    assert client.get("/").status_code == 200
    assert client.get("/", params={"token": token}).status_code == 303  # the same browser again
    client.cookies.clear()  # another browser, after a preview of the address
    assert client.get("/", params={"token": token}).status_code == 303


def test_two_servers_of_one_host_do_not_lock_each_other_out(watched):
    hosts = own_names("127.0.0.1")
    keys = Access(), Access()
    apps = [application(watched, key, hosts) for key in keys]
    jar: dict[str, str] = {}
    for app, key in zip(apps, keys):
        visitor = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
        jar |= visitor.get("/", params={"token": key.token}).cookies
    for app in apps:  # a browser sends all cookies of a host to every port
        visitor = TestClient(app, base_url="http://127.0.0.1", cookies=jar)
        assert visitor.get("/").status_code == 200


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "", "null", "//", "http://a]b"])
def test_an_origin_that_is_no_address_is_refused(inside, origin):
    answer = inside.get("/", headers={"origin": origin})
    assert answer.status_code == 403
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("address", [*ADDRESSES, "/events"])
@pytest.mark.parametrize("cookie", [None, "", "wrong", 'x"; y', "é"])
def test_nothing_without_the_key(client, access, address, cookie):
    headers = {} if cookie is None else {"cookie": f"{access.name}={cookie}".encode()}
    answer = client.get(address, headers=headers)
    assert answer.status_code == 403
    assert access.token not in answer.text
    assert client.get(address, params={"token": "wrong"}).status_code == 403


HOSTS = {
    "127.0.0.1": 200,
    "127.0.0.1:8420": 200,
    "localhost": 200,
    "LOCALHOST:9999": 200,  # a forwarded port
    "evil.com": 403,
    "127.0.0.1.evil.com": 403,
    "10.evil.com": 403,
    "localhost.evil.com": 403,
    "localhost.": 403,
    "127.0.0.1@evil.com": 403,
    "[::1]": 403,  # not what was bound
    "0.0.0.0": 403,
    "127.1": 403,
    "": 403,
    "127.0.0.1:8420:1": 403,
    "127.0.0.1 evil.com": 403,
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts(inside, host):
    assert inside.get("/", headers={"host": host}).status_code == HOSTS[host]


@pytest.mark.parametrize("hosts", [[], [b"127.0.0.1", b"127.0.0.1"], [b"127.0.0.1", b"evil.com"]])
def test_missing_and_double_hosts(watched, hosts):
    import anyio

    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {
        "type": "http", "method": "GET", "path": "/", "query_string": b"",
        "headers": [(b"host", host) for host in hosts],
    }  # fmt: skip
    anyio.run(application(watched, Access(), own_names("127.0.0.1")), scope, receive, send)
    assert sent[0]["status"] == 403


def test_own_names():
    assert own_names("127.0.0.1") == {"127.0.0.1", "localhost"}
    assert own_names("::1") == {"[::1]", "localhost"}
    assert own_names("192.0.2.7") == {"192.0.2.7"}
    assert {"127.0.0.1", "localhost"} < own_names("0.0.0.0")
    assert "0.0.0.0" not in own_names("0.0.0.0")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "ODD"])
@pytest.mark.parametrize("address", ["/", "/events", "/plotly.js", "/nothing"])
def test_only_reading(inside, method, address):
    answer = inside.request(method, address)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("address", [*ADDRESSES, "/events"])
def test_head(inside, address):
    answer = inside.head(address)
    assert (answer.status_code, answer.content) == (200, b"")


ORIGINS = {
    "http://127.0.0.1:8420": 200,
    "http://localhost": 200,
    "http://evil.com": 403,
    "http://127.0.0.1.evil.com": 403,
    "null": 403,
    "file://": 403,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_origins(inside, origin):
    assert inside.get("/", headers={"origin": origin}).status_code == ORIGINS[origin]


@pytest.mark.parametrize("address", [*ADDRESSES, "/nothing"])
def test_every_answer_is_sealed(inside, address):
    headers = inside.get(address).headers
    for name, value in HEADERS:
        assert headers.get_list(name) == [value]
    policy = headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe-eval" not in policy


def test_refusals_are_sealed_too(client):
    assert client.get("/").headers["x-frame-options"] == "DENY"


def test_websockets_are_closed(inside):
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), inside.websocket_connect("/events"):
        pass


def test_page_has_no_inline_script(inside):
    text = inside.get("/").text
    assert "<script>" not in text and "<style>" not in text
    assert 'src="/live.js"' in text and 'href="/page.css"' in text
