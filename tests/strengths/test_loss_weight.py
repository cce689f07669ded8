"""The sensitivity to a loss weight against whole runs; a smoothing that finds its way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tikhon as tk

GOAL, ASIDE = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.tensor([[-1.0, 1.0, 3.0]]).double()
CURVES = (1.5, 2.0)


def pulled(weight, steps, *, damping=None, optimizer=torch.optim.SGD, every=1, **options):
    """Weights between two goals, and the LossWeight if `damping` is given."""
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.3)
    opt = optimizer(model.parameters(), **options)
    held = weight
    if damping is not None:
        valid = (torch.zeros(2, 3).double(), torch.zeros(2, 1).double())
        strength = tk.Hypergradient(
            valid, nn.functional.mse_loss, steps=1000, every=every, start=weight,
            range=(weight, weight * (1 + 1e-12)), damping=damping,
        )  # fmt: skip
        held = tk.LossWeight(model, opt, strength)
    for _ in range(steps):
        opt.zero_grad()
        main = CURVES[0] / 2 * (model.weight - GOAL).square().sum()
        part = CURVES[1] / 2 * (model.weight - ASIDE).square().sum()
        (main + (held(part) if damping is not None else held * part)).backward()
        opt.step()
    return model.weight.detach().clone(), held


@pytest.mark.parametrize(
    ("options", "steps", "tolerance"),
    [({"lr": 0.05}, 30, 1e-4), ({"lr": 0.002, "momentum": 0.9}, 300, 0.02)],
)
def test_sensitivity_is_the_finite_difference_of_whole_runs(options, steps, tolerance):
    weight, e = 0.4, 1e-5
    _, held = pulled(weight, steps, damping=CURVES[0] + weight * CURVES[1], **options)
    high, _ = pulled(weight * math.exp(e), steps, **options)
    low, _ = pulled(weight * math.exp(-e), steps, **options)
    expected = (high - low) / (2 * e)
    found = held.state_dict()["sensitivity"][0].double()
    assert expected.abs().max() > 0.1
    assert (found - expected).norm() < tolerance * expected.norm() + 1e-6


def corrupted(share, steps=500, stop=None, state=None, start=0.1, **options):
    """A classifier of rows with wrong labels, smoothed by a LossWeight or by a fixed share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(260, 20, generator=generator)
    y = (x[:, 0] > 0).long()
    wrong = torch.rand(60, generator=generator) < 0.25
    y[:60][wrong] = 1 - y[:60][wrong]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = nn.functional.cross_entropy
    held = share
    if share is None:
        valid = (x[60:160], y[60:160])
        strength = tk.Hypergradient(valid, loss, steps=steps, start=start, range=(1e-3, 0.9))
        held = tk.LossWeight(model, opt, strength)
    first = 0
    if state:
        first = state["first"]
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        held.load_state_dict(state["weight"])
    for _ in range(first, stop or steps):
        out = model(x[:60])
        right, flat = loss(out, y[:60]), -out.log_softmax(1).mean()
        opt.zero_grad()
        (right + (held(flat - right) if share is None else share * (flat - right))).backward()
        opt.step()
    with torch.no_grad():
        return float(loss(model(x[160:]), y[160:])), held, model, opt


def test_label_smoothing_rises_where_labels_are_wrong():
    none, *_ = corrupted(0.0)
    fixed, *_ = corrupted(0.1)
    found, held, *_ = corrupted(None)
    assert held.value > 0.2
    assert found < fixed < none


def test_resume_is_exact():
    _, whole, model, _ = corrupted(None, steps=100)
    _, half, partly, opt = corrupted(None, steps=100, stop=43)
    state = {
        "first": 43,
        "model": partly.state_dict(),
        "optimizer": opt.state_dict(),
        "weight": half.state_dict(),
    }
    _, again, resumed, _ = corrupted(None, steps=100, state=state)
    assert again.value == whole.value != 0.1
    for a, b in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_the_weight_rests_in_the_last_tenth_and_after_removal():
    _, early, *_ = corrupted(None, steps=100, stop=90)
    _, late, model, opt = corrupted(None, steps=100)
    assert early.value == late.value
    late.remove()
    before = late.steps
    opt.zero_grad()
    model(torch.ones(1, 20)).sum().backward()
    opt.step()
    assert late.steps == before


def test_bad_input_is_named():
    model = nn.Linear(2, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    data = (torch.ones(2, 2), torch.ones(2, 1))

    def strength(**options):
        return tk.Hypergradient(data, nn.functional.mse_loss, steps=100, **options)

    with pytest.raises(ValueError, match=r"start must be the first weight.*received 0\.0"):
        tk.LossWeight(model, opt, strength())
    with pytest.raises(TypeError, match=r"must be a Hypergradient, received 0\.1"):
        tk.LossWeight(model, opt, 0.1)
    with pytest.raises(TypeError, match="no known stationary gain"):
        tk.LossWeight(model, torch.optim.Rprop(model.parameters()), strength(start=0.1))
