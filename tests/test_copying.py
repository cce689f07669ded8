"""Copies of models whose modules keep tensors of a forward pass: the copy computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tikhon as tk
from tikhon.copying import copied
from tikhon.training.recipe import Auto


class Keeps(nn.Module):
    """Keeps what it computed, as a tensor and inside containers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.hidden, self.seen = None, {"all": []}

    def forward(self, x):
        self.hidden = torch.relu(self.first(x))
        self.seen = {"all": [self.hidden, (self.hidden.sum(),)]}
        return self.last(self.hidden)


def pruned():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return prune.l1_unstructured(model[0], "weight", 0.5) and model


MODELS = {"keeps": Keeps, "pruned": pruned}


def rows():
    x = torch.randn(48, 4)
    return x, x[:, :3].argmax(1)


def used(name: str) -> nn.Module:
    """A model after one pass of the user's own."""
    torch.manual_seed(0)
    model = MODELS[name]()
    nn.functional.cross_entropy(model(rows()[0]), rows()[1]).backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_computes_the_same_and_shares_nothing(name):
    model = used(name)
    twin = copied(model, model)
    x, _ = rows()
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(bool(p.any()) for p in model.parameters())
    twin(x).sum().backward()  # it trains


@pytest.mark.parametrize("name", MODELS)
def test_every_verb_that_copies_takes_it(name):
    x, y = rows()
    model = used(name)
    tk.diagnose(model, (x, y), "cross_entropy", optimizer=torch.optim.Adam)
    tk.fit(model, (x, y), tk.Recipe(averaging="ema"), epochs=1)
    tk.fit(
        model,
        (x, y),
        tk.Recipe(tk.Term(tk.L2(), strength=Auto())),
        valid=(x, y),
        epochs=20,
        batch_size=16,
        refit=True,
    )
