"""What a diagnosis costs: rows that pass through the model, for each row that is trained on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from faulty import classes
from tikhon.diagnosis import diagnose


class Counted(nn.Module):
    """A network that counts the rows of its passes; a pass back counts twice."""

    passed = 0

    def __init__(self, rate):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(rate), nn.Linear(32, 4))

    def forward(self, x):
        output = self.body(x)
        Counted.passed += len(x)
        if output.requires_grad:
            output.register_hook(self._back)
        return output

    @staticmethod
    def _back(grad):
        Counted.passed += 2 * len(grad)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_diagnosis_costs_less_than_four_trainings_of_its_steps(rate):
    torch.manual_seed(0)
    x, y = classes(1200)
    model, Counted.passed = Counted(rate), 0
    engine = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = diagnose(
        model,
        (x[:900], y[:900]),
        nn.CrossEntropyLoss(),
        optimizer=engine,
        valid=(x[900:], y[900:]),
        steps=120,
    )
    assert found.ok, str(found)
    assert Counted.passed < 4 * 3 * 120 * 64


def test_the_last_look_has_all_scores_though_time_ran_out(monkeypatch):
    from tikhon.diagnosis import dry_run

    asked = iter([False] * 9)
    monkeypatch.setattr(dry_run, "out_of_time", lambda: next(asked, True))
    x, y = classes(300)
    model = Counted(0.0)
    found = diagnose(
        model,
        (x, y),
        nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(model.parameters()),
        valid=(x[:100], y[:100]),
        steps=20,
    )
    end = found.record.points[-1]
    assert end.step == found.record.steps == 10
    assert None not in (end.loss, end.eval_loss, end.valid_loss, end.metric, end.valid_metric)
