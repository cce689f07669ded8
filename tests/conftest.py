"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

import browser

# every run draws the same examples; --hypothesis-profile=default draws new ones
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # for the few rows that skglm is asked about


def pytest_collection_finish():
    """What was imported and collected is no garbage: the collector need not walk through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # torch's tests make few cycles: a tenth of the young collections


@pytest.fixture(scope="session", autouse=True)
def seeds_of_devices():
    """Without a device no seed is kept for it: torch would note the stack of each call."""
    import torch

    patch = pytest.MonkeyPatch()
    if not torch.accelerator.is_available():
        for device in (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(device, "manual_seed_all", lambda seed: None)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def disk():
    """No write waits until it is on the disk; tests of that replace the call themselves."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda handle: None)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the benchmark data sets (.npz with X and y, `mnist/` with IDX files)."""
    path = Path(os.environ.get("TIKHON_BENCHMARK_DATA", Path(__file__).parents[2] / "shared/data"))
    if not (path / "index.json").exists():
        pytest.skip("benchmark data sets absent: set TIKHON_BENCHMARK_DATA to their folder")
    return path


@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests of a worker."""
    opened = browser.Browser(browser.executable())
    yield opened
    opened.close()


@pytest.fixture
def tab(chromium):
    """A page with nothing stored."""
    opened = browser.Tab(chromium, limit=120)
    yield opened
    opened.close()
