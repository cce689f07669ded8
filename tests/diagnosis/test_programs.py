"""The labelled benchmark programs, where they are: nothing moves, faults are found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def programs(shared_data):
    path = Path(__file__).parents[2] / "benchmarks" / "diagnosis.py"
    spec = importlib.util.spec_from_file_location("benchmark_diagnosis", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.programs(shared_data)
    if found is None:
        pytest.skip("faulty_programs.json absent: set TIKHON_BENCHMARK_DATA to its folder")
    return found
