"""Programs from public reports build and run, and the harness that asks of them counts right."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
try:
    from programs import exam, form

    PROGRAMS, LOOPS = form.load("frozen")
    FRESH, FRESH_LOOPS = form.load("fresh")
    THIRD, THIRD_LOOPS = form.load("third")
    FOURTH, FOURTH_LOOPS = form.load("fourth")
    FIFTH, FIFTH_LOOPS = form.load("fifth")
    SIXTH, SIXTH_LOOPS = form.load("sixth")
    SEVENTH, SEVENTH_LOOPS = form.load("seventh")
    EIGHTH, EIGHTH_LOOPS = form.load("eighth")
finally:  # its layers.py would stand in for the package of the same name beside this one
    sys.path.pop()


ASKED = [
    *PROGRAMS,
    *FRESH,
    *THIRD,
    *FOURTH,
    *FIFTH,
    *SIXTH,
    *SEVENTH,
    *EIGHTH,
]  # made of torch alone


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=pytest.mark.slow) for p in ASKED],
    ids=lambda p: p.name,
)
def test_a_program_runs_once(program):
    for repaired in (False, True):
        parts = program.build(0, repaired=repaired)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not repaired else "error")
            score = form.train(replace(parts, steps=1))
        assert -1 <= score <= 1
        if repaired:
            assert torch.stack([p.isfinite().all() for p in parts.model.parameters()]).all()


def test_the_exams_are_large_and_each_report_is_linked_once():
    assert len(PROGRAMS) >= 42
    assert len(LOOPS) >= 14
    assert len(FRESH) == 44
    assert len(FRESH_LOOPS) == 12
    assert len(THIRD) == 38
    assert len(THIRD_LOOPS) == 10
    assert len(FOURTH) == 40
    assert len(FOURTH_LOOPS) == 12
    assert len(FIFTH) == 48
    assert len(FIFTH_LOOPS) == 14
    assert len(SIXTH) == 40
    assert len(SIXTH_LOOPS) == 14
    assert len(SEVENTH) == 30
    assert len(SEVENTH_LOOPS) == 13
    assert len(EIGHTH) == 12
    assert len(EIGHTH_LOOPS) == 8
    items = [*PROGRAMS, *LOOPS, *FRESH, *FRESH_LOOPS, *THIRD, *THIRD_LOOPS, *FOURTH, *FOURTH_LOOPS]
    items += [*FIFTH, *FIFTH_LOOPS, *SIXTH, *SIXTH_LOOPS]
    items += [*SEVENTH, *SEVENTH_LOOPS, *EIGHTH, *EIGHTH_LOOPS]
    sources = [item.source for item in items]
    assert all(source.startswith("https://") for source in sources)
    assert len(set(sources)) == len(sources)
    assert all(item.low < item.high for item in items)


def squares(wrong: bool) -> form.Parts:
    x = torch.randn(400, 4)
    y = x[:, :1] + 0.5 * x[:, 1:2] ** 2
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    train = (x[:300], y[:300, 0] if wrong else y[:300])
    return form.Parts(model, train, nn.MSELoss(), form.adam(model), form.r2(x[300:], y[300:]))


def cleared_too_early(wrong: bool, watch) -> float:
    x = torch.randn(400, 4)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = form.adam(model)
    with watch(model, optimizer):
        for _ in range(100):
            rows = torch.randint(300, (32,))
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            if wrong:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
    return form.accuracy(x[300:], y[300:])(model)


TOYS = (
    form.Program(
        "squares", "https://example.org/1", "broadcast_loss",
        lambda: squares(True), lambda: squares(False), 0.3, 0.7,
    ),
    form.Loop(
        "cleared too early", "https://example.org/2", "no_gradient",
        lambda w: cleared_too_early(True, w), lambda w: cleared_too_early(False, w), 0.8, 0.9,
    ),
)  # fmt: skip


def test_the_harness_counts_two_toys_right():
    rows = [
        {"id": case["id"], "seed": 0, "case": case, **exam.ask(case, 0, steps=60)}
        for case in exam.cases(TOYS)
    ]
    assert set(exam.figures(rows).values()) == {1.0}
    assert exam.by_cause(rows) == {"broadcast_loss": (1, 1, 0), "no_gradient": (1, 1, 0)}
    assert exam.misses(rows) == []
    assert "| `no_gradient` | 1 of 1 | 0 |" in exam.table(rows, "toy")
    json.dumps([{k: v for k, v in row.items() if k != "case"} for row in rows])


def test_a_wrong_answer_a_crash_and_an_alarm_count_against_tikhon(monkeypatch):
    sick, well = exam.cases(TOYS[:1])

    def row(case, codes, error=""):
        return {"id": case["id"], "seed": 0, "case": case, "codes": codes, "error": error}

    rows = [row(sick, ["underfitting", "broadcast_loss"]), row(well, ["underfitting"])]
    found = exam.figures(rows)
    assert (found["detected"], found["top finding accepted"], found["true cause on top"]) == (
        1,
        0,
        0,
    )
    assert found["repaired programs without an alarm"] == 0
    assert len(exam.misses(rows)) == 2

    def crash(*args, **options):
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(exam, "diagnose", crash)
    rows = [row(case, **{k: v for k, v in exam.ask(case, 0).items() if k != "seconds"})
            for case in (sick, well)]  # fmt: skip
    found = exam.figures(rows)
    assert found["detected"] == found["repaired programs without an alarm"] == 0
    assert "ZeroDivisionError" in exam.misses(rows)[0]


def test_the_scores_tell_the_toys_apart():
    program, loop = TOYS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the shapes
        assert form.train(program.build(0)) <= program.low
    assert form.train(program.build(0, repaired=True)) >= program.high
    assert loop.run(form.unwatched, 0) <= loop.low
    assert loop.run(form.unwatched, 0, repaired=True) >= loop.high
