"""Schedules: their ends, their shape, and what they refuse."""

from __future__ import annotations

import sys
from subprocess import run

import pytest
from hypothesis import given, settings, strategies as st

from tikhon.strengths.schedules import Cosine, Cyclic, Linear, WarmUp

LEVEL = st.floats(0, 1e3)
STEPS = st.integers(1, 1000)


@pytest.mark.parametrize("kind", [Linear, Cosine])
@settings(deadline=None, max_examples=30)
@given(start=LEVEL, end=LEVEL, steps=STEPS)
def test_goes_monotonically_from_start_to_end_and_stays(kind, start, end, steps):
    schedule = kind(start, end, steps)
    values = [schedule(step) for step in range(steps + 1)]
    assert values[0] == start
    assert values[-1] == end == schedule(steps + 1) == schedule(10 * steps)
    assert sorted(values, reverse=start > end) == pytest.approx(values, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(strength=LEVEL, steps=STEPS, delay=st.integers(0, 50))
def test_warm_up_rests_rises_and_stays(strength, steps, delay):
    schedule = WarmUp(strength, steps, delay=delay)
    assert all(schedule(step) == 0 for step in range(delay + 1))
    assert schedule(delay + steps) == strength == schedule(delay + steps + 7)
    assert schedule(delay + 1) == pytest.approx(strength / steps)


@settings(deadline=None, max_examples=30)
@given(low=LEVEL, high=LEVEL, half=st.integers(1, 50), step=st.integers(0, 500))
def test_cycle_repeats_and_is_symmetric(low, high, half, step):
    schedule = Cyclic(low, high, period=2 * half)
    assert schedule(step) == schedule(step + 2 * half)
    assert schedule(half - step % half) == pytest.approx(schedule(half + step % half))
    assert (schedule(0), schedule(half)) == (low, high)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Linear(-1.0, 0.0, 5), "start must be finite and >= 0, received -1.0"),
        (lambda: Linear(0.0, float("nan"), 5), "end must be finite"),
        (lambda: Cosine(0.0, 1.0, 0), "steps must be at least 1, received 0"),
        (lambda: WarmUp(1.0, 5, delay=-1), "delay"),
        (lambda: Cyclic(0.0, 1.0, 0), "period"),
    ],
)
def test_refuses_with_name_and_value(build, word):
    with pytest.raises(ValueError, match=word):
        build()


def test_needs_only_the_standard_library():
    code = "import sys, tikhon.strengths.schedules; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).returncode == 0
