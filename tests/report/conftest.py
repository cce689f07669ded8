from __future__ import annotations

import pytest

from sample_runs import compare_run, cure_run, demo_run, diagnosis_run, fit_run, path_run, tune_run

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


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    return tune_run(tmp_path_factory.mktemp("runs") / "tune")


@pytest.fixture(scope="session")
def pathed(tmp_path_factory):
    return path_run(tmp_path_factory.mktemp("runs") / "path")


@pytest.fixture(scope="session")
def diagnosed(tmp_path_factory):
    return diagnosis_run(tmp_path_factory.mktemp("runs") / "diagnosis")


@pytest.fixture(scope="session")
def cured(tmp_path_factory):
    return cure_run(tmp_path_factory.mktemp("runs") / "cure")


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    return compare_run(tmp_path_factory.mktemp("runs") / "compare")
