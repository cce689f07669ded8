"""Penalties and clipping in a diagnosis are those of the user's own program."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tikhon as tk
from faulty import CE, adam, classes, deep, he, sgd
from tikhon.data.batches import order


def run(penalty=None, optimizer=None, **options):
    torch.manual_seed(0)
    model = he(deep(2, nn.ReLU, 32))
    engine = (optimizer or adam(0.01))(model.parameters())
    return tk.diagnose(
        model, classes(), CE, optimizer=engine, steps=120, penalty=penalty, **options
    )


TERMS = [
    tk.L2(20.0),
    tk.L1(1.0),
    tk.Term(tk.L2(30.0), how="decoupled"),
    {"*.weight": tk.GroupLasso(3)},
]


@pytest.mark.parametrize("term", TERMS, ids=["L2", "L1", "decoupled L2", "GroupLasso"])
def test_terms_that_outweigh_the_data_are_named(term):
    found = run(term)
    finding = next(f for f in found.findings if f.code == "underfitting")
    assert "penalty" in finding.why
    assert finding.evidence["penalty_share"] > 0.6


def test_small_terms_are_measured_and_left_alone():
    found = run(tk.L2(1e-3))
    shares = [r.penalty for r in found.record.probes[1].readings if r.penalty is not None]
    assert shares
    assert max(shares) < 0.1
    assert found.ok, str(found)


def test_a_callable_gives_the_share_of_its_gradient():
    found = run(lambda m: 1e-3 * sum(p.square().sum() for p in m.parameters()))
    first = found.record.probes[0].readings
    shares = [r.penalty for r in first if r.penalty is not None]
    assert len(shares) == 3
    assert 0 < max(shares) < 0.2


def test_terms_train_as_regularize_does():
    found = run({"*.weight": tk.L1(1e-2)}, sgd(0.1))
    torch.manual_seed(0)
    model = he(deep(2, nn.ReLU, 32))
    engine = sgd(0.1)(model.parameters())
    tk.regularize(model, engine, {"*.weight": tk.L1(1e-2)})
    x, y = classes()
    losses = []
    for epoch in range(60):
        for rows in order(len(x), seed=0, epoch=epoch).split(64):
            engine.zero_grad()
            loss = CE(model(x[rows]), y[rows])
            loss.backward()
            engine.step()
            losses.append(float(loss.detach()))
    assert found.record.losses == pytest.approx(losses[:120], rel=1e-5)


def test_clipping_is_the_users_and_its_share_of_slowness_is_seen():
    free, clipped = run(optimizer=sgd(0.1)), run(optimizer=sgd(0.1), clip=1e-4)
    assert free.ok, str(free)
    assert clipped.record.optimizer["clip"] == 1e-4
    assert "slow_convergence" in clipped.labels
    moved = [p.readings[0].update for p in clipped.record.probes if p.readings[0].update]
    assert max(moved) < 1e-4
