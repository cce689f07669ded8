"""Copies of models whose modules keep tensors of a forward pass: the copy computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tikhon as tk
from tikhon.copying import copy_with_model
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
    twin = copy_with_model(model, model)
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


def beside(layers):
    """A block as minGPT writes it, and other functions over layers of their own model."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)
            m = self
            parts = [self.first, self.norm]
            ways = {
                "a closure": lambda x: m.last(m.norm(torch.relu(m.first(x)))),
                "a list": lambda x: m.last(parts[1](torch.relu(parts[0](x)))),
                "a default": lambda x, last=self.last: last(m.norm(torch.relu(m.first(x)))),
                "in a list": [lambda x: m.last(m.norm(torch.relu(m.first(x))))],
            }
            self.way = ways[layers]

        def forward(self, x):
            return (self.way[0] if isinstance(self.way, list) else self.way)(x)

    return Block()


@pytest.mark.parametrize("layers", ["a closure", "a list", "a default", "in a list"])
@pytest.mark.parametrize("copies", [1, 2])
def test_functions_over_layers_call_those_of_the_copy(layers, copies):
    torch.manual_seed(0)
    model = beside(layers).eval()
    twin = copy_with_model(model, model)
    if copies == 2:  # as `AveragedModel` makes one
        twin = copy.deepcopy(twin)
    x, y = rows()
    assert torch.equal(twin(x), model(x))
    before = model(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(x).any()
    assert torch.equal(model(x), before)
    twin.train()
    nn.functional.cross_entropy(twin(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_a_forward_that_was_put_over_a_model_goes_with_its_copy():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model.forward = lambda x: model[1](torch.relu(model[0](x)))
    twin = copy_with_model(model, model)
    with torch.no_grad():
        twin[1].weight.zero_()
        twin[1].bias.zero_()
    assert not twin(rows()[0]).any()


def test_what_a_function_holds_of_others_is_shared():
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    student.guide = lambda x: teacher(x)
    twin = copy_with_model(student, student)
    assert twin.guide is student.guide


def test_a_block_over_its_own_layers_is_diagnosed_and_left_as_it_was():
    torch.manual_seed(0)
    model = beside("a closure")
    engine = torch.optim.Adam(model.parameters(), 1e-2)
    found = tk.diagnose(model, rows(), nn.functional.cross_entropy, optimizer=engine, steps=40)
    assert not found.labels & {"unused_parameters", "random_in_eval", "frozen_parameters"}
    assert all(p.grad is None for p in model.parameters())


def test_an_average_of_a_block_is_that_of_one_written_plainly():
    class Plain(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.first, self.norm, self.last = block.first, block.norm, block.last

        def forward(self, x):
            return self.last(self.norm(torch.relu(self.first(x))))

    torch.manual_seed(0)
    block, data = beside("a closure"), rows()
    recipe = tk.Recipe(averaging="ema")
    models = [copy_with_model(block, block), Plain(copy_with_model(block, block))]
    runs = [
        tk.fit(model, data, recipe, valid=data, epochs=5, loss="cross_entropy") for model in models
    ]
    assert torch.equal(*[run.model.eval()(data[0]) for run in runs])
