"""`Recipe(sparsify=...)`: what is asked is what comes out, averaged, stopped early or resumed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.errors import InputError
from tikhon.sparsity import Thinning
from tikhon.training import fit
from tikhon.training.recipe import Recipe


def rows(count=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2)
    )


def zeros(model):
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


ASKED = [0.9, "90%", {"share": 0.9}, Thinning(0.9)]


@pytest.mark.parametrize("asked", ASKED, ids=["number", "text", "table", "value"])
def test_a_recipe_takes_a_share_in_every_form(asked, tmp_path):
    recipe = Recipe(sparsify=asked)
    assert recipe.to_dict() == {"sparsify": 0.9}
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe


def test_a_recipe_keeps_all_that_was_asked(tmp_path):
    recipe = Recipe(sparsify="50%,of=channels,multiple=8,repair=0.3")
    recipe.save(tmp_path / "recipe.toml")
    found = Recipe.load(tmp_path / "recipe.toml").sparsify
    assert found == Thinning(0.5, "channels", multiple=8, repair=0.3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (1.0, "share must be in"),
        ("100%", "share must be in"),
        ("much", "share must be a number, in"),
        ("90%,off=channels", "did you mean 'of'"),
        ("90%,channels", "expected KEY=VALUE"),
        ({"of": "channels"}, "share is missing"),
        ("90%,of=chanels", "did you mean 'channels'"),
        ("90%,multiple=0.5", "multiple must be"),
        (True, "share must be a number, in"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(asked, message):
    with pytest.raises(InputError, match=message):
        Recipe(sparsify=asked)


@pytest.mark.parametrize("averaging", [None, "ema", "swa"])
@pytest.mark.parametrize("early_stopping", [None, 1])
def test_what_was_asked_is_what_comes_out(averaging, early_stopping):
    recipe = Recipe(sparsify=0.8, averaging=averaging, early_stopping=early_stopping)
    run = fit(network(), rows(), recipe, valid=rows(seed=1), epochs=12, lr=0.01)
    assert zeros(run.model) == pytest.approx(0.8, abs=1e-3)
    assert run.sparsity is not None and run.sparsity.share == pytest.approx(0.8, abs=1e-3)
    assert "80.00% requested" in str(run)
    reached = [row["sparsity/zeros"] for row in run.history]
    assert reached == sorted(reached) and reached[0] < 0.5


def test_channels_take_their_example_from_the_rows():
    run = fit(network(), rows(), Recipe(sparsify="50%,of=channels"), epochs=8, lr=0.01)
    small = tk.compact(run.model.eval(), rows()[0][:4])
    assert small.compaction.units["0"][1] <= 12 and small.compaction.units["2"][1] <= 12


def test_a_run_that_ends_before_its_schedule_says_what_was_reached():
    stops = iter(range(10_000))
    run = fit(network(), rows(), Recipe(sparsify=0.8), epochs=40, stop=lambda: next(stops) > 30)
    assert run.sparsity is not None and run.sparsity.share < 0.8
    assert "Only" in str(run) and "before pruning is complete at step 60" in str(run)


@pytest.mark.parametrize("stop", [3, 11, 25])
def test_a_resumed_run_is_the_same_run(stop, tmp_path):
    recipe = Recipe(sparsify="70%,of=weights", averaging="ema")
    whole = fit(network(), rows(), recipe, epochs=10, lr=0.01).model
    count = iter(range(10_000))
    fit(
        network(), rows(), recipe, epochs=10, lr=0.01, output=tmp_path / "run",
        stop=lambda: next(count) >= stop,
    )  # fmt: skip
    again = fit(
        network(), rows(), recipe, epochs=10, lr=0.01, output=tmp_path / "run", resume=True
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.model.parameters()))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["sparsity"]["share"] == pytest.approx(0.7, abs=1e-3)


def test_another_target_is_not_a_resume(tmp_path):
    count = iter(range(10_000))
    fit(
        network(), rows(), Recipe(sparsify=0.7), epochs=9, output=tmp_path / "run",
        stop=lambda: next(count) >= 5,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"recipe\.sparsify +0\.7 +0\.8"):
        fit(
            network(), rows(), Recipe(sparsify=0.8), epochs=9, output=tmp_path / "run", resume=True
        )
