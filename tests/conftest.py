"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# every run draws the same examples; --hypothesis-profile=default draws new ones
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the benchmark data sets (.npz with X and y, `mnist/` with IDX files)."""
    path = Path(os.environ.get("TIKHON_BENCHMARK_DATA", Path(__file__).parents[2] / "shared/data"))
    if not (path / "index.json").exists():
        pytest.skip("benchmark data sets absent: set TIKHON_BENCHMARK_DATA to their folder")
    return path
