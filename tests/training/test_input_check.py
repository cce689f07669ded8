"""Rows that score and do not fit the model are refused before the first step, by every verb."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.errors import DataError
from tikhon.training.input_check import check_model_accepts

X = torch.randn(40, 6)
Y = (X[:, 0] > 0).long()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_by_name(valid):
    loss = nn.functional.cross_entropy
    verbs = {
        "fit": lambda: tk.fit(network(), (X, Y), valid=valid, epochs=1),
        "tests": lambda: tk.fit(network(), (X, Y), valid=(X, Y), test=valid, epochs=1),
        "tune": lambda: tk.tune(network, (X, Y), valid=valid, epochs=2, budget="1runs"),
        "path": lambda: tk.path(None, (X, Y), tk.L1(), valid=valid),
        "diagnose": lambda: tk.diagnose(network(), (X, Y), loss, valid=valid, steps=3),
    }
    for name, verb in verbs.items():
        where = "test" if name == "tests" else "valid"
        with pytest.raises(DataError, match=rf"{where}: its rows have the shape \("):
            verb()


@pytest.fixture(params=[(9, 5), (9, 6, 1), (9, 7)])
def valid(request):
    return torch.randn(*request.param), torch.arange(9) % 2


def test_lengths_that_the_model_takes_are_no_fault():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    check_model_accepts(model, torch.randn(4, 1, 9), torch.randn(4, 1, 12))
    before = network().state_dict()
    model = network()
    model.load_state_dict(before)
    state = torch.get_rng_state()
    with pytest.raises(DataError):
        check_model_accepts(model, X, X[:, :5])
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
