"""Budgets are of CPU time here: on a busy machine a cure gets as far as on an idle one."""

from __future__ import annotations

import time

import pytest


@pytest.fixture(autouse=True)
def cpu_time(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.process_time)
