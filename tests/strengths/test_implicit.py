"""Implicit slopes against the derivative of closed-form and refitted solutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.errors import InputError
from tikhon.strengths.implicit import implicit_slopes

torch.manual_seed(1)
X, NOISE = torch.randn(60, 8).double(), torch.randn(60, 1).double()
Y = (
    X
    @ torch.tensor(
        [
            [1.0],
            [0.5],
            [
                0,
            ],
            [0],
            [0],
            [0],
            [2.0],
            [0],
        ]
    ).double()
    + 2 * NOISE
)
TRAIN, VALID = (X[:30], Y[:30]), (X[30:], Y[30:])


def half(output, target):
    return (output - target).square().mean() / 2


def ridge(strength):
    x, y = TRAIN
    return torch.linalg.solve(
        x.T @ x / len(x) + strength * torch.eye(8).double(), x.T @ y / len(x)
    )


def linear(w):
    model = nn.Linear(8, 1, bias=False).double()
    model.weight.data.copy_(w.T)
    return model


@pytest.mark.parametrize("strength", [0.01, 0.3, 3.0])
def test_slope_of_ridge_is_the_derivative_of_its_closed_form(strength):
    log = torch.tensor(strength).double().log().requires_grad_()
    (expected,) = torch.autograd.grad(half(VALID[0] @ ridge(log.exp()), VALID[1]), log)
    found = implicit_slopes(
        linear(ridge(strength)), half, TRAIN, VALID, {"weight": tk.L2(strength)}, iterations=400
    )
    assert found["weight"] == pytest.approx(float(expected), rel=1e-4)


def test_slope_of_the_lasso_is_the_difference_of_refits():
    from sklearn.linear_model import Lasso

    def refit(strength):
        fit = Lasso(strength, fit_intercept=False, tol=1e-12, max_iter=100_000)
        return torch.from_numpy(fit.fit(TRAIN[0].numpy(), TRAIN[1].numpy().ravel()).coef_)[:, None]

    def valid_loss(log):
        return float(half(VALID[0] @ refit(0.3 * float(torch.tensor(log).exp())), VALID[1]))

    expected = (valid_loss(1e-4) - valid_loss(-1e-4)) / 2e-4
    coefficients = refit(0.3)
    assert 0 < int((coefficients == 0).sum()) < 8
    found = implicit_slopes(
        linear(coefficients), half, TRAIN, VALID, {"weight": tk.L1(0.3)}, iterations=400
    )
    assert found["weight"] == pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    implicit_slopes(model, half, TRAIN, VALID, {"0.weight": tk.L2(0.1)}, iterations=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_named():
    model = linear(ridge(1.0))
    with pytest.raises(ValueError, match="did you mean 'weight'"):
        implicit_slopes(model, half, TRAIN, VALID, {"weigth": tk.L2(0.1)})
    with pytest.raises(ValueError, match="iterations must be at least 1, received 0"):
        implicit_slopes(model, half, TRAIN, VALID, {"weight": tk.L2(0.1)}, iterations=0)


@pytest.mark.parametrize(
    ("loss", "train", "valid", "rows"),
    [
        (nn.CrossEntropyLoss(), (TRAIN[0], torch.full((30,), 5)), VALID, "training"),
        (lambda output: output, TRAIN, VALID, "training"),
        (half, TRAIN, (VALID[0][:, :2], VALID[1]), "validation"),
    ],
)
def test_rows_that_the_loss_does_not_take_are_named(loss, train, valid, rows):
    with pytest.raises(InputError, match=f"the loss fails on the first {rows} batch"):
        implicit_slopes(linear(ridge(1.0)), loss, train, valid, {"weight": tk.L2(0.1)})


@pytest.mark.parametrize("penalties", [tk.L2(0.1), {"weight": 0.1}])
def test_penalties_of_another_form_are_refused(penalties):
    with pytest.raises(InputError, match="a mapping from parameters' names to penalties"):
        implicit_slopes(linear(ridge(1.0)), half, TRAIN, VALID, penalties)
