"""The optimizer of a training: what is given is used, and what would be ignored is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tikhon.errors import InputError
from tikhon.training.recipe import Recipe
from tikhon.training.settings import Settings

FORMS = {
    "name": lambda model: "adamw",
    "class": lambda model: torch.optim.AdamW,
    "factory": lambda model: partial(torch.optim.AdamW, lr=0.25),
    "instance": lambda model: torch.optim.AdamW(model.parameters(), lr=0.25),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_rate_that_is_given_is_the_rate_of_the_optimizer(form):
    model = nn.Linear(2, 2)
    built = Settings(optimizer=FORMS[form](model), lr=0.25).build_optimizer(model)
    assert [group["lr"] for group in built.param_groups] == [0.25]


@pytest.mark.parametrize("form", ["factory", "instance"])
def test_a_rate_beside_an_optimizer_with_another_is_refused(form):
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"lr=0.1 is given with .* lr=0.25, which is used"):
        Settings(optimizer=FORMS[form](model), lr=0.1).build_optimizer(model)
    own = Settings(optimizer=FORMS[form](model)).build_optimizer(model)
    assert own.param_groups[0]["lr"] == 0.25


def test_a_run_records_the_rate_of_the_instance():
    model = nn.Linear(2, 2)
    kept = Settings(optimizer=FORMS["instance"](model)).describe()
    assert (kept["name"], kept["lr"]) == ("AdamW", 0.25)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"optimizer": 5}, "optimizer must be a name, a class.*received 5"),
        ({"optimizer": "AdamW"}, "did you mean 'adamw'"),
        ({"lr": "1e-3"}, "lr must be a number, received '1e-3'"),
        ({"momentum": None}, "momentum must be a number, received None"),
        ({"epochs": 2.5}, "epochs must be a whole number, 1 or more, received 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number, 0 or more and below .*, received 'a'"),
    ],
)
def test_other_settings_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Settings(**settings)


NET = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
RATES = {
    "a module": ({"0": 0.1}, [0.1, 0.1, None, None, None, None]),
    "the later counts": ({"*": 0.1, "2.bias": 0.3}, [0.1, 0.1, 0.1, 0.1, 0.1, 0.3]),
    "all, over the others": ({"2.bias": 0.3, "*": 0.1}, [0.1] * 6),
    "a glob": ({"*.weight": 0.2}, [0.2, None, 0.2, None, 0.2, None]),
}


@pytest.mark.parametrize("form", ["name", "class", "factory"])
@pytest.mark.parametrize("case", RATES)
def test_patterns_give_parts_of_a_model_learning_rates(form, case):
    """Biases and scales too; what no pattern names has lr."""
    rates, expected = RATES[case]
    built = Settings(optimizer=FORMS[form](NET), lr=0.25).build_optimizer(NET, rates)
    found = {p: group["lr"] for group in built.param_groups for p in group["params"]}
    assert [found[p] for p in NET.parameters()] == [0.25 if r is None else r for r in expected]
    assert len(found) == sum(len(group["params"]) for group in built.param_groups)


@pytest.mark.parametrize(
    ("form", "rates", "said"),
    [
        ("name", {"3.*": 0.1}, r"learning_rates: no parameter matches: unknown pattern '3.\*'"),
        ("instance", {"*": 0.1}, "this one has parameter groups: give its name"),
    ],
)
def test_learning_rates_that_reach_nothing_are_refused(form, rates, said):
    with pytest.raises(InputError, match=said):
        Settings(optimizer=FORMS[form](NET)).build_optimizer(NET, rates)


@pytest.mark.parametrize("given", [0.1, [0.1], "0.1", "a", {"a": 0}, {"a": -1.0}, {"a": "b"}])
def test_learning_rates_that_are_no_rates_are_refused(given):
    with pytest.raises(InputError, match=r"learning_rates go from patterns|learning rate of 'a'"):
        Recipe(learning_rates=given)


def test_learning_rates_are_text_or_a_table():
    text = Recipe(learning_rates="trunk.*=1e-5, head.*=0.1")
    assert text == Recipe(learning_rates={"trunk.*": 1e-5, "head.*": 0.1})
    assert Recipe(learning_rates={}) == Recipe()
