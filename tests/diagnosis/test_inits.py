"""Symptoms that come and go with the draw of the weights are counted over draws of a factory."""

from __future__ import annotations

import json

import torch
from torch import nn

import tikhon as tk
from faulty import CE, classes, deep, he, sgd
from tikhon.diagnosis import Record, judge
from tikhon.diagnosis.diagnose import DRAWS


def sometimes(bad):
    """A factory whose draws are sick where `bad` says so."""

    def build():
        model = he(deep(3, nn.ReLU, 32))
        if bad(int(torch.initial_seed())):
            nn.init.constant_(model[2].bias, -50.0)
        return model

    return build


def run(build, **options):
    return tk.diagnose(build, classes(), CE, optimizer=sgd(0.1), steps=10, **options)


def test_random_symptoms_are_counted():
    found = run(sometimes(lambda seed: seed % 2 == 0))
    assert "(in 3 of 5 initialisations)" in next(
        f.why for f in found.findings if f.code == "dying_relu"
    )
    spared = run(sometimes(lambda seed: seed == 3))
    finding = next(f for f in spared.findings if f.code == "dying_relu")
    assert finding.severity == "warning"
    assert "not with the first initialisation" in finding.why
    assert "(in 1 of 5 initialisations)" in finding.why
    again = judge(Record.from_dict(json.loads(spared.to_json())["record"]))
    assert again.labels == spared.labels


def test_oscillation_is_looked_for_in_every_draw():
    jumping = tk.diagnose(
        lambda: he(deep(2, nn.Tanh)),
        classes(),
        CE,
        optimizer=sgd(1.5, momentum=0.95),
        steps=40,
        batch_size=4,
    )
    codes = [code for labels in jumping.record.inits for code in labels]
    assert len(jumping.record.inits) == DRAWS
    assert codes.count("oscillating_loss") >= 2, str(jumping)


def test_a_healthy_factory_stays_healthy_and_a_bound_optimizer_serves_every_draw():
    model = he(deep(2, nn.ReLU, 32))
    engine = torch.optim.Adam(model.parameters(), lr=0.01)
    state = torch.get_rng_state()
    build = lambda: he(deep(2, nn.ReLU, 32))  # noqa: E731
    found = tk.diagnose(build, classes(), CE, optimizer=engine, steps=20)
    assert torch.equal(state, torch.get_rng_state())
    assert found.ok, str(found)
    assert found.record.optimizer["lr"] == 0.01
    assert found.record.inits == ((),) * DRAWS
