"""A linear model trained through `regularize` ends where scikit-learn ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import nn, optim

import tikhon as tk

X, Y = load_diabetes(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
Y = (Y - Y.mean()) / Y.std()
M = len(Y)


def trained(terms, make, steps=800):
    """Weights after full-batch training on `1/(2m) sum (y - yhat)^2`."""
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    torch.manual_seed(0)
    model = nn.Linear(X.shape[1], 1, bias=False).double()
    optimizer = make(model.parameters())
    tk.regularize(model, optimizer, {"weight": terms})
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for step in range(steps):
        optimizer.zero_grad()
        ((model(x).squeeze(1) - y).square().sum() / (2 * M)).backward()
        optimizer.step()
        if step > steps // 4:
            schedule.step()
    return model.weight.detach().squeeze(0).numpy()


MAKE = {
    "SGD": lambda p: optim.SGD(p, lr=0.2),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01),
    "Adam": lambda p: optim.Adam(p, lr=0.05),
    "AdamW": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.5),
}


@pytest.mark.parametrize("make", MAKE)
def test_lasso(make):
    alpha = 0.03
    reference = Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X, Y)
    w = trained(tk.L1(alpha), MAKE[make])
    assert 0 < np.count_nonzero(reference.coef_) < 10
    assert np.array_equal(w != 0, reference.coef_ != 0)
    np.testing.assert_allclose(w, reference.coef_, atol=1e-5)


CYCLED = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "dampened": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.02, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.1),
}


def cycled(make, penalty, stop=None):
    """Weights after one cycle of rate and momentum, taken up in the middle from a checkpoint."""
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    torch.manual_seed(0)
    model = nn.Linear(X.shape[1], 1, bias=False).double()
    optimizer = make(model.parameters())
    peak = optimizer.param_groups[0]["lr"]
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=900)
    reg = tk.regularize(model, optimizer, {"weight": penalty})
    for step in range(899):
        if step == stop:
            state = reg.state_dict()
            reg.remove()
            reg = tk.regularize(model, optimizer, {"weight": penalty})
            reg.load_state_dict(state)
        optimizer.zero_grad()
        ((model(x).squeeze(1) - y).square().sum() / (2 * M)).backward()
        optimizer.step()
        schedule.step()
    return model.weight.detach().squeeze(0).numpy()


@pytest.mark.parametrize("make", CYCLED)
def test_lasso_while_a_scheduler_moves_the_momentum(make):
    reference = Lasso(alpha=0.03, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X, Y)
    w = cycled(CYCLED[make], tk.L1(0.03))
    assert np.array_equal(w != 0, reference.coef_ != 0)
    np.testing.assert_allclose(w, reference.coef_, atol=1e-4)
    assert np.array_equal(w, cycled(CYCLED[make], tk.L1(0.03), stop=600))


@pytest.mark.parametrize("make", ["SGD", "SGD momentum", "Adam"])
def test_ridge(make):
    strength = 0.5
    reference = Ridge(alpha=M * strength, fit_intercept=False, tol=1e-14).fit(X, Y)
    np.testing.assert_allclose(trained(tk.L2(strength), MAKE[make]), reference.coef_, atol=1e-5)


@pytest.mark.parametrize("make", ["SGD nesterov", "AdamW"])
def test_elastic_net(make):
    options = {"alpha": 0.1, "l1_ratio": 0.6, "fit_intercept": False}
    reference = ElasticNet(**options, tol=1e-14, max_iter=100_000).fit(X, Y)
    w = trained(tk.ElasticNet(0.1, l1_ratio=0.6), MAKE[make])
    assert np.array_equal(w != 0, reference.coef_ != 0)
    np.testing.assert_allclose(w, reference.coef_, atol=1e-5)


def test_l1_as_a_gradient_never_gives_zeros():
    """Why there is a prox: the penalty in the loss, by autograd, stays off zero."""
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    torch.manual_seed(0)
    model = nn.Linear(X.shape[1], 1, bias=False).double()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - y).square().sum() / (2 * M)
        (loss + 0.03 * model.weight.abs().sum()).backward()
        optimizer.step()
    assert model.weight.count_nonzero() == 10
