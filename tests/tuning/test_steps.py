"""Steps of the user's own: losses that call the model, that are no mean over rows, many inputs."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tikhon as tk
from tikhon.errors import InputError
from tikhon.training import fit
from tikhon.tuning.space import Int, Log, Space, Uniform
from tikhon.tuning.trials import History
from tikhon.tuning.tune import TuneResult, tune

SPACE = Space(lr=Log(1e-3, 1e-1), weight_decay="auto")


def rows(count=120):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return x, ((x[:, 0] * x[:, 1] + 0.3 * x[:, 2]) > 0).long()


def network(width=8):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))


class Pair(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(2, width)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, first, second):
        return self.head(torch.cat([self.first(first), self.second(second)], 1).relu())


class Normal(nn.Linear):
    """A mean and a variance."""

    def forward(self, x):
        out = super().forward(x)
        return out[:, 0], out[:, 1].exp()


def of_batch(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def of_pair(model, batch):
    first, second, y = batch
    return F.cross_entropy(model(first, second), y)


def noisy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)


def normal(output, y):
    return F.gaussian_nll_loss(output[0], y, output[1])


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]))
X, Y = rows()
PARTS = (X[:, :4], X[:, 4:])
PROGRAMS = {
    "loss(model, batch)": (network, (X, Y), of_batch, "the loss calls the model itself"),
    "several inputs to it": (Pair, (*PARTS, Y), of_pair, "the loss calls the model itself"),
    "several inputs": (Pair, (PARTS, Y), "auto", "the model takes several inputs"),
    "two outputs": (
        lambda: Normal(6, 2), (X, X[:, 0].clone()), normal, "returns a tuple, not one tensor",
    ),
    "weights of classes": (network, (X, Y), WEIGHTED, "is not the mean of the losses of its rows"),
    "noise of its own": (network, (X, Y), noisy, "the loss calls the model itself"),
}  # fmt: skip


def search(name, **given) -> TuneResult:
    build, data, loss, _ = PROGRAMS[name]
    asked = {"space": SPACE, "budget": "2runs", "epochs": 2, "loss": loss, **given}
    return tune(build, data, **asked)


# every program once, with and without folds in turn
@pytest.mark.parametrize(("name", "folds"), list(zip(PROGRAMS, cycle((2, 0)))))
def test_a_step_of_ones_own_is_searched_one_by_one_and_told_why(name, folds):
    found = search(name, folds=folds, batch_size=20)
    assert found.plan.chunk == 1 and PROGRAMS[name][3] in found.plan.reason
    _, data, _, _ = PROGRAMS[name]
    run = fit(found.model, data, found.recipe, valid=data, **found.settings)
    assert run.metrics["valid/loss"] < 2


@pytest.mark.parametrize(("name", "folds"), [("noise of its own", 0), ("several inputs", 2)])
def test_a_search_by_steps_of_ones_own_repeats_every_bit(name, folds):
    found, again = (search(name, folds=folds, batch_size=20) for _ in range(2))
    assert [o.score for o in found.history] == [o.score for o in again.history]
    pairs = zip(found.model.parameters(), again.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_average_takes_the_inputs_that_its_members_take():
    assert search("several inputs").average(*PARTS).shape == (len(Y), 2)


class Dictionaries(Dataset):
    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        return {"first": PARTS[0][index], "second": PARTS[1][index], "label": int(Y[index])}


def test_named_inputs_reach_the_model_and_the_step_by_their_names():
    def named(model, batch):
        return F.cross_entropy(model(batch["first"], batch["second"]), batch["label"])

    loader = DataLoader(Dictionaries(), batch_size=20, shuffle=True)
    space = Space(lr=Log(1e-3, 1e-1), weight_decay=[0.01])  # "auto" knows the loss of one answer
    scores = []
    for loss in ("auto", named):
        found = tune(Pair, loader, space=space, budget="3runs", epochs=4, loss=loss, folds=0)
        scores.append([o.score for o in found.history])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("folds", [0, 2])
def test_a_step_that_is_a_loss_finds_what_the_loss_finds(folds):
    space = Space(lr=Log(1e-3, 1e-1), weight_decay=0.01)
    histories: list[History] = [
        search("loss(model, batch)", loss=loss, space=space, folds=folds).history
        for loss in (of_batch, "cross_entropy")
    ]
    own, usual = ([o.score for o in history] for history in histories)
    assert own == pytest.approx(usual, rel=1e-2)  # means over blocks, and over rows


def test_the_choice_among_steps_is_within_the_noise_of_their_blocks():
    """One block of validation rows that is hard for all tells nothing about the candidates."""
    found = search("loss(model, batch)", space=Space(lr=Log(1e-4, 1e-1)), budget="6runs")
    assert found.audit.candidates > 1 and 0 < found.audit.gain_error < 1


def test_a_search_by_steps_is_stopped_and_resumed_bit_for_bit(tmp_path):
    class Crash(Exception):
        pass

    def crash(event):
        if event["event"] == "outcomes":
            raise Crash

    given = {"epochs": 8, "budget": "4runs", "batch_size": 60}
    with pytest.raises(Crash):
        search("noise of its own", output=tmp_path, on_event=crash, **given)
    resumed = search("noise of its own", output=tmp_path, resume=True, **given)
    whole = search("noise of its own", **given)
    assert [o.score for o in resumed.history] == [o.score for o in whole.history]
    pairs = zip(resumed.model.parameters(), whole.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_another_loss_does_not_resume_a_search(tmp_path):
    search("loss(model, batch)", output=tmp_path)
    with pytest.raises(InputError, match="loss"):
        search("noise of its own", output=tmp_path, resume=True)


@pytest.mark.parametrize("name", ["mixup", "label_smoothing"])
def test_what_needs_outputs_is_refused_beside_a_step_of_ones_own(name):
    space = Space(**{"lr": 0.01, name: Uniform(0.1, 0.2)})
    with pytest.raises(InputError, match=r"calls the model itself|needs the loss cross_entropy"):
        search("loss(model, batch)", space=space)


def test_a_loss_of_ones_own_is_not_taken_for_one_of_the_same_name():
    def nll(output, y):
        return F.cross_entropy(output, y)

    found = tune(network, (X, Y), loss=nll, space=SPACE, budget="2runs", epochs=2)
    assert found.settings["loss"] is nll


def test_a_metric_compares_what_a_step_trains():
    found = search("loss(model, batch)", metric="accuracy", space=Space(lr=Log(1e-3, 0.1)))
    assert found.audit.metric == "accuracy" and 0 < found.audit.chosen_score <= 1


def test_a_pretrained_trunk_has_a_smaller_learning_rate():
    trunk = nn.Linear(6, 8)

    class Tuned(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.trunk, self.head = trunk, nn.Sequential(nn.Linear(8, width), nn.Linear(width, 2))

        def forward(self, x):
            return self.head(self.trunk(x).relu())

    space = Space(
        lr={"trunk.*": 1e-7, "head.*": Log(1e-3, 1e-1)}, weight_decay=0.0, width=Int(4, 9)
    )
    found = tune(Tuned, (X, Y), space=space, budget="3runs", epochs=4)
    assert torch.allclose(found.model.trunk.weight, trunk.weight, atol=1e-4)
    assert found.recipe.learning_rates == {
        "trunk.*": 1e-7, "head.*": found.config["lr[head.*]"],
    }  # fmt: skip
    assert tk.Recipe.from_dict(found.recipe.to_dict()) == found.recipe
