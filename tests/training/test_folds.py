"""Strengths "auto" without validation rows: found on folds, followed on all rows."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.data.splits import assign_parts
from tikhon.errors import InputError
from tikhon.regularizer.terms import Term
from tikhon.runs.interrupt import Stopped
from tikhon.strengths.schedules import Recorded
from tikhon.training import fit
from tikhon.training.folds import FOLDS, FoldStrengths
from tikhon.training.recipe import Auto, Recipe

pytestmark = pytest.mark.filterwarnings(  # from folds of 20 rows
    "ignore:Hypergradient. the strength on .* acts by a share"
)

AUTO = Recipe(Term(tk.L2(), how="decoupled", strength=Auto()))
GIVEN = {"optimizer": "adamw", "lr": 0.01, "epochs": 6, "batch_size": 16, "linear": False}


def rows(count, seed, signal=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    noise = torch.randn(count, generator=generator)
    return x, ((x[:, 0] if signal else 0) + noise > 0).long()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.mark.filterwarnings("ignore:Hypergradient. the strength on .* rests at the upper end")
def test_it_finds_more_where_there_is_nothing_to_learn_and_helps_there():
    train, test = rows(120, 0, signal=False), rows(800, 1, signal=False)
    given = {**GIVEN, "epochs": 24}
    found = fit(network(), train, AUTO, test=test, **given)
    plain = fit(network(), train, test=test, **given)
    assert found.metrics["test/loss"] < 0.75 * plain.metrics["test/loss"]
    signal = fit(network(), rows(120, 0), AUTO, **given)

    def strength(run):
        return run.history[-1]["penalty/0.weight/L2/strength"]

    assert strength(found) > strength(signal) > 0
    assert len({row["penalty/0.weight/L2/strength"] for row in found.history}) > 10


@pytest.fixture(scope="module")
def whole():
    return fit(network(), rows(60, 0), AUTO, **GIVEN)


def test_the_same_seed_finds_the_same_model_and_a_resume_does_too(whole, tmp_path):
    again = fit(network(), rows(60, 0), AUTO, **GIVEN)
    seen = []  # the epochs of the run on all rows; those of the folds are not told
    asked = {**GIVEN, "output": tmp_path / "run"}
    halfway = {"stop": lambda: len(seen) >= 3, "on_epoch": seen.append}
    assert fit(network(), rows(60, 0), AUTO, **halfway, **asked).ended == "stopped"
    resumed = fit(network(), rows(60, 0), AUTO, resume=True, **asked)
    for other in (again, resumed):
        pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_stop_while_strengths_are_sought_is_told():
    with pytest.raises(Stopped, match="before the strengths were found"):
        fit(network(), rows(60, 0), AUTO, stop=lambda: True, **GIVEN)


def test_every_fold_has_its_share_of_every_class():
    y = torch.arange(90) % 5
    place = assign_parts(y, FOLDS, seed=0)
    assert place.bincount().tolist() == [30] * FOLDS
    for fold in range(FOLDS):
        assert y[place == fold].bincount().tolist() == [6] * 5
    assert not torch.equal(place, assign_parts(y, FOLDS, seed=1))


def test_what_is_followed_is_the_geometric_mean_at_every_share_of_the_way():
    class Ran:
        def __init__(self, *strengths):
            self.strengths = strengths

        def replay(self, steps):
            return {
                "w": [Term(tk.L2(), strength=Recorded(self.strengths, steps)), Term(tk.L1(2.0))]
            }

    mean, fixed = FoldStrengths((Ran(1.0, 4.0), Ran(4.0, 1.0, 9.0, 9.0)), 0.0).replay(8)["w"]
    assert [mean.strength(step) for step in range(0, 8, 2)] == pytest.approx([2, 1, 6, 6])
    assert fixed.penalty.strength == 2.0


def bound(params):
    return torch.optim.AdamW(params, lr=0.01)


@pytest.mark.parametrize(
    ("recipe", "count", "more", "message"),
    [
        (Recipe(AUTO.penalties, early_stopping=2), 60, {}, "needs validation data"),
        (AUTO, 5, {}, "there are 5"),
        (AUTO, 60, {"instance": True}, "bound to the model"),
    ],
)
def test_what_cannot_be_found_so_is_refused(recipe, count, more, message):
    model = network()
    given = dict(GIVEN)
    if more:
        given["optimizer"] = bound(model.parameters())
    with pytest.raises(InputError, match=message):
        fit(model, rows(count, 0), recipe, **given)


def test_a_budget_holds_for_the_folds_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(network(), rows(300, 0), AUTO, budget="1s", **{**GIVEN, "epochs": 5000})
    assert run.ended == "budget" and math.isfinite(run.metrics["train/loss"])
    assert 0.25 < run.seconds < 3


def test_a_folder_that_cannot_take_the_run_is_refused_before_the_folds_are_trained(tmp_path):
    fit(network(), rows(60, 0), **{**GIVEN, "epochs": 1}, output=tmp_path / "run")
    (tmp_path / "file").touch()
    asked = [0]

    def stop():
        asked[0] += 1
        return False

    for given, message in (
        ({"output": tmp_path / "run"}, "already holds a run"),
        ({"output": tmp_path / "run", "resume": True}, "is finished"),
        ({"output": tmp_path / "none", "resume": True}, "nothing to resume"),
        ({"output": tmp_path / "file"}, "is a file"),
    ):
        with pytest.raises(InputError, match=message):
            fit(network(), rows(60, 0), AUTO, **GIVEN, **given, stop=stop)
    assert asked == [0] and not (tmp_path / "none").exists()


def test_batches_that_can_be_read_but_once_serve_the_folds_and_the_run(whole):
    x, y = rows(60, 0)
    once = fit(network(), iter([(x[:30], y[:30]), (x[30:], y[30:])]), AUTO, **GIVEN)
    for left, right in zip(once.model.parameters(), whole.model.parameters()):
        assert torch.equal(left, right)
