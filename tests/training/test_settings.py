"""The optimizer of a training: what is given is used, and what would be ignored is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tikhon.errors import InputError
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
    with pytest.raises(InputError, match=r"lr=0.1 is given beside .* lr=0.25, which is used"):
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
        ({"seed": "a"}, "seed must be a whole number, 0 or more, received 'a'"),
    ],
)
def test_other_settings_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Settings(**settings)
