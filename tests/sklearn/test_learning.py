"""An estimator is `fit` with sample weights: the same batches, the same step, the same losses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.utils import check_random_state

import tikhon as tk
from tikhon.sklearn import RegularizedClassifier, RegularizedRegressor
from tikhon.sklearn.learning import Learner, Rows, outputs, predictions, summed_losses
from tikhon.sklearn.network import Network
from tikhon.training.losses import LOSSES

rng = np.random.default_rng(0)
X = rng.normal(size=(23, 3))  # in batches of 11 a row is left over: it joins the batch before
TARGETS = {
    "numbers": X @ [1.0, -1.0, 0.5] + 0.1 * rng.normal(size=23),
    "classes": np.arange(23) % 3,
}
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize("batch_size", [11, 23])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("l1_ratio", [0.0, 1.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_an_estimator_trains_as_fit_does(kind, l1_ratio, dropout, batch_size):
    estimator = RegularizedRegressor if kind == "numbers" else RegularizedClassifier
    settings = {"alpha": 0.02, "l1_ratio": l1_ratio, "dropout": dropout, "random_state": 3}
    still = estimator((5,), batch_size=batch_size, learning_rate_init=1e-300, max_iter=1)
    network = copy.deepcopy(still.set_params(**settings).fit(X, TARGETS[kind]).network_)
    found = estimator((5,), batch_size=batch_size, max_iter=4, **settings).fit(X, TARGETS[kind])

    random = check_random_state(3)
    random.randint(2**31)  # the first weights
    penalty = tk.L1(0.02) if l1_ratio else tk.L2(0.02)
    y = torch.from_numpy(TARGETS[kind])
    if kind == "numbers":
        y = ((y - y.mean()) / y.std(correction=0))[:, None]
    run = tk.fit(
        network, (torch.from_numpy(X), y), tk.Recipe({"linear.*.weight": penalty}),
        loss="half_mse" if kind == "numbers" else "cross_entropy", lr=0.01, epochs=4,
        batch_size=batch_size, seed=random.randint(2**31), linear=False,
    )  # fmt: skip
    for layer, coef, bias in zip(run.model.linear, found.coefs_, found.intercepts_, strict=True):
        np.testing.assert_allclose(layer.weight.detach().T, coef, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.bias.detach(), bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_a_learner_scores_and_steps_alike_on_dense_and_sparse_rows(form):
    torch.manual_seed(0)
    network = Network((3, 4, 2), "tanh", 0.0, torch.float64)
    weights = rng.uniform(0.5, 2, 5000)
    x = rng.normal(size=(5000, 3))
    rows = Rows.of(form(x), rng.normal(size=(5000, 2)), weights)
    learner = Learner(network, LOSSES["half_mse"], rows, {}, lr=0.01, size=5000, seed=0)
    with torch.no_grad():
        errors = (network(torch.from_numpy(x)).numpy() - rows.y) ** 2 / 2
    wanted = np.average(errors.sum(1), weights=weights)
    assert learner.score(rows) == pytest.approx(wanted, rel=1e-12)
    assert learner.epoch(0) == pytest.approx(wanted, rel=1e-12)  # the objective before the step
    assert learner.score(rows) < wanted
    network.unit.fill_(3.0), network.offset.fill_(1.0)
    np.testing.assert_allclose(predictions(network, form(x)), outputs(network, x).numpy() * 3 + 1)


@pytest.mark.parametrize("name", ["half_mse", "bce", "cross_entropy"])
def test_losses_are_summed_over_outputs_but_not_over_classes(name):
    output, target = torch.randn(6, 3), torch.eye(3)[torch.arange(6) % 3]
    found = summed_losses(LOSSES[name], output, target)
    share = 1 if name == "cross_entropy" else 3
    rows = [share * LOSSES[name](output[i : i + 1], target[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(found, torch.stack(rows))
