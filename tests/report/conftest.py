from __future__ import annotations

import pytest

import browser
from sample_runs import demo_run, fit_run

HOSTILE = "<img src=x onerror=alert(1)>{}</script><script>alert(2)</script>"


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    return fit_run(tmp_path_factory.mktemp("runs") / "fit")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    return fit_run(tmp_path_factory.mktemp("runs") / "hostile", parameter=HOSTILE, epochs=3)


@pytest.fixture(scope="session")
def demoed(tmp_path_factory):
    return demo_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def tab():
    opened = browser.Tab(browser.executable())
    yield opened
    opened.close()
