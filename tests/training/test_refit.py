"""The strengths that a run has found: judged at its end, and followed on all rows."""

import copy

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.errors import InputError
from tikhon.training import fit
from tikhon.training.losses import loss_of
from tikhon.training.recipe import Auto, Recipe
from tikhon.training.strength_verdicts import judge_strengths

AUTO = Recipe(tk.Term(tk.L2(), strength=Auto()))


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x, (x[:, 0] + torch.randn(count, generator=generator) > 0).long()


TRAIN, VALID, TEST = rows(90, 0), rows(60, 1), rows(60, 2)
SETTINGS = {"epochs": 16, "lr": 0.01, "batch_size": 30}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def test_a_refit_follows_the_found_strengths_on_train_and_valid():
    first = fit(network(), TRAIN, AUTO, valid=VALID, **SETTINGS)
    again = fit(network(), TRAIN, AUTO, valid=VALID, test=TEST, refit=True, **SETTINGS)
    assert again.history[-1]["valid/loss"] == first.history[-1]["valid/loss"]
    for name, penalty in again.penalties.items():
        assert penalty["strength"] == pytest.approx(first.penalties[name]["strength"], rel=1e-6)
        assert "verdict" not in penalty  # no validation rows are left to judge by
    assert set(again.metrics) == {
        f"{p}/{k}" for p in ("train", "test") for k in ("loss", "accuracy")
    }

    assert len({row["penalty/0.weight/L2/strength"] for row in first.history}) > 10
    for left, right in zip(first.model.parameters(), again.model.parameters()):
        assert not torch.equal(left, right)
    twice = fit(network(), TRAIN, AUTO, valid=VALID, refit=True, **SETTINGS)
    for left, right in zip(twice.model.parameters(), again.model.parameters()):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("recipe", "valid", "message"),
    [
        (AUTO, None, "needs validation data"),
        (Recipe(tk.L2(0.1)), None, "give `valid`"),
        (Recipe(tk.L2(0.1)), VALID, "this recipe has none"),
        (Recipe(AUTO.penalties, early_stopping=3), VALID, "leave early_stopping out"),
    ],
)
def test_what_cannot_be_refitted_is_refused(recipe, valid, message):
    with pytest.raises(InputError, match=message):
        fit(network(), TRAIN, recipe, valid=valid, refit=True, **SETTINGS)


def test_a_stopped_refit_continues_to_the_same_model(tmp_path):
    whole = fit(network(), TRAIN, AUTO, valid=VALID, refit=True, **SETTINGS)
    count = 0

    def stop():
        nonlocal count
        count += 1
        return count == 3 * SETTINGS["epochs"] + 17  # in the second training

    asked = {"valid": VALID, "refit": True, "output": tmp_path / "run", **SETTINGS}
    half = fit(network(), TRAIN, AUTO, stop=stop, **asked)
    assert half.ended == "stopped"
    rest = fit(network(), TRAIN, AUTO, resume=True, **asked)
    assert rest.ended == "epochs"
    for left, right in zip(whole.model.parameters(), rest.model.parameters()):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("how", "optimizer", "strength", "verdict"),
    [
        ("objective", torch.optim.SGD, 0.05, "too little"),
        ("objective", torch.optim.SGD, 3.0, "too much"),
        ("decoupled", torch.optim.SGD, 0.05, "too little"),
        ("decoupled", torch.optim.AdamW, 3.0, "too much"),
    ],
)
@pytest.mark.filterwarnings("ignore:Hypergradient.*upper end")  # held there
def test_a_wrong_strength_is_judged_wrong(how, optimizer, strength, verdict):
    """Ridge with nearly as many inputs as rows: it fits noise, or little at all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 30, generator=generator)
    y = x[:, :3].sum(1, keepdim=True) + torch.randn(120, 1, generator=generator)
    train, valid = (x[:40], y[:40]), (x[40:], y[40:])
    model = nn.Linear(30, 1, bias=False)
    options = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
    opt = optimizer(model.parameters(), lr=0.05, **options)
    held = tk.Hypergradient(
        valid, nn.functional.mse_loss, steps=500, start=strength,
        range=(strength, strength * (1 + 1e-9)),
    )  # fmt: skip
    reg = tk.regularize(model, opt, tk.L2(held), how=how)
    for _ in range(500):
        opt.zero_grad()
        nn.functional.mse_loss(model(train[0]), train[1]).backward()
        opt.step()
    before = copy.deepcopy(model.state_dict())
    found = judge_strengths(model, reg, loss_of(nn.functional.mse_loss), train, valid)["weight/L2"]
    assert found["verdict"] == verdict
    assert torch.equal(model.weight, before["weight"])


def test_an_optimizer_that_is_bound_to_the_first_model_is_refused_before_any_step():
    model = network()
    before = copy.deepcopy(model.state_dict())
    own = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    with pytest.raises(InputError, match="this optimizer is bound to the first"):
        fit(model, TRAIN, AUTO, valid=VALID, refit=True, optimizer=own, **SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    factory = lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0)  # noqa: E731
    assert fit(model, TRAIN, AUTO, valid=VALID, refit=True, optimizer=factory, **SETTINGS).ended
