"""Steps that are too long or too short: what a control run or the optimizer's own numbers say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from faulty import classes
from tikhon.diagnosis import diagnose
from tikhon.languages import sentence


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def run(model, data, optimizer, **options):
    return diagnose(model, data, nn.CrossEntropyLoss(), optimizer=optimizer, **options)


def test_a_loss_that_climbs_is_never_healthy_however_many_rows_are_right():
    torch.manual_seed(0)
    model = net()
    engine = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.99)
    found = run(model, classes(), engine, steps=100)
    assert found.record.points[-1].metric > 0.7  # most rows are right, the others wildly wrong
    first = found.findings[0]
    assert (first.code, first.severity) == ("oscillating_loss", "critical"), str(found)
    assert first.evidence["climb"] > 3


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(12, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        h = self.embed(tokens)
        for _ in range(2):
            h = self.norm(h + self.down(torch.relu(self.up(h))))
        return self.head(h.mean(1))


@pytest.mark.parametrize(("rate", "code"), [(1.0, "oscillating_loss"), (0.01, None)])
def test_long_steps_are_proven_by_the_same_run_with_a_tenth_of_the_rate(rate, code):
    torch.manual_seed(0)
    tokens = torch.randint(12, (400, 6), generator=torch.Generator().manual_seed(0))
    model = Words()
    engine = torch.optim.Adam(model.parameters(), lr=rate)
    found = run(model, (tokens, (tokens % 3).mode(1).values), engine, steps=100)
    assert next((f.code for f in found.findings if f.severity != "info"), None) == code, str(found)
    assert ("calmer_loss" in found.record.reference) == (code is not None)
    if code:
        first = found.findings[0]
        assert first.evidence["calmer"] > first.evidence["learned"] + 0.3
        assert "a tenth of the learning rate" in first.why


@pytest.mark.parametrize(
    ("options", "clip", "words"),
    [
        ({"lr": 0.0}, None, "the learning rate is 0"),
        ({"lr": 1e-3, "eps": 10.0}, None, "eps=10"),
        ({"lr": 1e-3, "eps": 1.0}, 1e-4, "clip=0.0001"),
    ],
)
def test_what_shortens_the_steps_is_named(options, clip, words):
    torch.manual_seed(0)
    model = net()
    engine = torch.optim.Adam(model.parameters(), **options)
    found = run(model, classes(), engine, steps=30, clip=clip)
    slow = next(f for f in found.findings if f.code == "slow_convergence")
    assert words in slow.why, slow.why
    assert slow.effect == sentence("effect_slow_convergence")
    assert "; ".join(slow.advice) != sentence("cures_slow_convergence")
