"""Programs that are wired wrong are named by their cause; the same wired right stay silent."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

import wired
import wired_answers
from tikhon.diagnosis import Record, diagnose, judge
from tikhon.diagnosis.checks.wiring import axis_order, registration_line
from tikhon.diagnosis.thresholds import MEASURES

SLOW = (
    "unrelated_labels",
    "frozen_parameters",
    "class_imbalance",
    "undefined_operation",
    "no_nonlinearity",
)
LATE = (  # they have learned after more steps
    *("shuffled numbers", "encoder", "norm of many", "squares", "dropout in front of the end"),
)


def run(program, steps=8):
    torch.manual_seed(0)
    return diagnose(
        program.model(),
        program.data(),
        program.loss,
        optimizer=program.optimizer,
        **{"steps": steps, **program.options},
    )


def first_of_each_cause(count: int) -> list:
    """All programs; those behind the first of a cause are of the weekly run."""
    seen: Counter[str] = Counter()
    cells = []
    for program in (*wired.FAULTY, *wired_answers.FAULTY):
        seen[program.code] += 1
        late = seen[program.code] > count
        cells.append(pytest.param(program, marks=pytest.mark.slow if late else ()))
    return cells


@pytest.mark.parametrize("program", first_of_each_cause(2), ids=lambda p: p.name)
def test_the_cause_of_a_wrong_wire_is_on_top_with_a_line_to_write(program):
    found = run(program, steps=100 if program.code in SLOW else 8)
    first = found.findings[0]
    assert first.code == program.code, str(found)
    assert first.fix
    assert first.why
    assert set(first.evidence) <= set(MEASURES)
    assert not found.record.wiring["unmeasured"]
    assert program.says in f"{first.where} {first.why} {first.fix}", first
    again = judge(Record.from_dict(json.loads(found.to_json())["record"]))
    assert [f.code for f in again.findings] == [f.code for f in found.findings]


@pytest.mark.parametrize("program", [*wired.RIGHT, *wired_answers.RIGHT], ids=lambda p: p.name)
def test_the_same_wired_right_is_silent(program):
    found = run(program, steps=60 if program.name in LATE else 10)
    assert found.ok, str(found)


def test_the_line_of_the_users_own_code_is_named():
    found = run(next(p for p in wired.FAULTY if p.name == "detach"))
    line = found.findings[0].why
    assert "wired.py:" in line
    assert ".detach()" in line


def test_symptoms_fold_under_the_wire_that_makes_them():
    found = run(next(p for p in wired.FAULTY if p.name == "squares broadcast"), steps=100)
    folded = {f.code: f.cause for f in found.findings[1:]}
    assert folded.get("underfitting", "broadcast_loss") == "broadcast_loss"


def test_the_lines_to_write_follow_the_names_and_shapes():
    assert (
        registration_line("body.blocks['a'].weight") == "self.blocks = nn.ModuleDict(self.blocks)"
    )
    assert registration_line("weights[1]") == "self.weights = nn.ParameterList(self.weights)"
    assert registration_line("scale") == "self.scale = nn.Parameter(self.scale)"
    assert axis_order([13, 8, 8, 3], [13, 3, 8, 8]) == []
    assert axis_order([13, 7, 3], [13, 3, 7]) == [0, 2, 1]


def test_a_test_that_the_model_does_not_let_run_is_said():
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 4)

        def forward(self, x):
            if len(x) < 20:
                raise ValueError("20 rows at least")
            return self.layer(x)

    found = diagnose(Fixed(), wired.classes(), torch.nn.CrossEntropyLoss())
    assert "20 rows at least" in found.record.wiring["unmeasured"]["rows"]
