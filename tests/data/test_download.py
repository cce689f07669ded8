import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tikhon.data import load, mnist
from tikhon.data.download import fetch
from tikhon.errors import DataError

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/whole/, /ranges/ (honours Range), /torn/ (breaks off once), /wrong/, /missing/."""

    requests: list[tuple[str, str | None]]
    torn: int

    def do_GET(self):
        kind, wanted = self.path.split("/")[1], self.headers.get("Range")
        type(self).requests.append((kind, wanted))
        if kind == "missing":
            self.send_error(404)
            return
        body = CONTENT if kind != "wrong" else CONTENT[::-1]
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and kind != "whole" else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if kind == "torn" and not start:
            self.wfile.write(body[:100_000])
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Fresh", (Handler,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", handler
        httpd.shutdown()
        thread.join()


def get(url, folder, *kinds):
    return fetch("f.gz", [f"{url}/{kind}/" for kind in kinds], sha256=SHA256, folder=folder)


def test_download_is_verified_and_not_repeated(server, tmp_path):
    url, handler = server
    path = get(url, tmp_path / "new", "whole")
    assert path.read_bytes() == CONTENT
    assert get(url, tmp_path / "new", "whole") == path
    assert len(handler.requests) == 1
    assert [p.name for p in path.parent.iterdir()] == ["f.gz"]


def test_next_mirror_after_a_missing_and_a_wrong_one(server, tmp_path):
    url, handler = server
    assert get(url, tmp_path, "missing", "wrong", "whole").read_bytes() == CONTENT
    assert [kind for kind, _ in handler.requests] == ["missing", "wrong", "whole"]


def test_a_torn_transfer_is_continued_and_nothing_incomplete_gets_the_name(server, tmp_path):
    url, handler = server
    with pytest.raises(DataError, match=r"f.gz could not be downloaded"):
        get(url, tmp_path, "torn")
    assert not (tmp_path / "f.gz").exists()
    assert (tmp_path / "f.gz.part").stat().st_size == 100_000
    assert get(url, tmp_path, "ranges").read_bytes() == CONTENT
    assert handler.requests[-1] == ("ranges", "bytes=100000-")


def test_a_complete_part_needs_no_bytes(server, tmp_path):
    (tmp_path / "f.gz.part").write_bytes(CONTENT)
    assert get(server[0], tmp_path, "ranges").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path / "f.gz.part").write_bytes(b"rubbish")
    assert get(server[0], tmp_path, "whole").read_bytes() == CONTENT


def test_every_mirror_is_named_with_its_reason(server, tmp_path):
    url, _ = server
    with pytest.raises(DataError) as caught:
        fetch("f.gz", [f"{url}/missing/", f"{url}/wrong/", "http://127.0.0.1:9/"], sha256=SHA256,
              folder=tmp_path)  # fmt: skip
    for reason in ("Not Found", "wrong checksum", "127.0.0.1:9"):
        assert reason in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_network_and_no_files_is_one_error_with_all_ways(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TIKHON_DATA", raising=False)
    spec = mnist.SETS["mnist"]
    offline = type(spec)(("http://127.0.0.1:9/",), spec.gz, spec.content, spec.classes)
    monkeypatch.setitem(mnist.SETS, "mnist", offline)
    with pytest.raises(DataError) as caught:
        load("mnist")
    assert "--data-dir" in str(caught.value) and "127.0.0.1:9" in str(caught.value)
