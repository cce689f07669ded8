"""The search over supports: the minimum of the same objective, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso

import tikhon as tk
from tikhon.paths import active_set, solver
from tikhon.paths.active_set import Gram, minimize_on_active_set
from tikhon.paths.linear import LinearProblem
from tikhon.paths.penalised import FeaturePenalty
from tikhon.paths.solver import solve

SHAPES = {"tall": (60, 12), "wide": (30, 80), "square": (25, 25)}
FLAWS = {
    "none": lambda x: x,
    "duplicated": lambda x: np.hstack([x[:, :2], x[:, :-2]]),
    "proportional": lambda x: np.hstack([-3 * x[:, :1], x[:, :-1]]),
    "constant": lambda x: np.hstack([np.full((len(x), 1), 7.0), x[:, 1:]]),
    "units": lambda x: x * 10.0 ** np.linspace(-8, 8, x.shape[1]),
}


def rows(shape, flaw, seed=0):
    draw = np.random.default_rng(seed)
    n, p = SHAPES[shape]
    x = draw.standard_normal((n, p)) + 0.7 * draw.standard_normal((n, 1))
    y = x[:, :4] @ np.array([3.0, -2.0, 1.0, 0.5]) + 0.5 * draw.standard_normal(n)
    return FLAWS[flaw](x), y


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_it_is_where_scikit_learns_coordinate_descent_ends(shape, flaw, ratio):
    x, y = rows(shape, flaw)
    found = tk.path(None, (x, y), tk.ElasticNet(l1_ratio=ratio), strengths=12)
    assert max(found.residuals) < 1e-11
    if flaw == "units":  # theirs needs far too many rounds: residuals say the same
        return
    for k in (3, 7, 11):
        kind = Lasso(found.strengths[k]) if ratio == 1 else ElasticNet(found.strengths[k])
        exact = kind.set_params(tol=1e-13, max_iter=100_000)
        if ratio < 1:
            exact.set_params(l1_ratio=ratio)
        exact.fit(x, y)
        ours = x @ found.coefficients[k, 0].numpy() + float(found.intercepts[k])
        np.testing.assert_allclose(ours, exact.predict(x), atol=1e-7 * y.std())


@pytest.mark.parametrize("flaw", FLAWS)
def test_the_proximal_steps_end_where_it_does(flaw, monkeypatch):
    x, y = rows("tall", flaw)
    given = {"strengths": 8, "positive": True, "sample_weight": np.arange(len(y)) % 3}
    factors = torch.ones(x.shape[1])
    factors[3] = 0.0
    searched = tk.path(None, (x, y), tk.L1(weights=factors), **given)
    monkeypatch.setattr(solver, "minimize_on_active_set", lambda *args, **more: None)
    stepped = tk.path(None, (x, y), tk.L1(weights=factors), **given)
    for a, b in zip(searched.coefficients[:, 0], stepped.coefficients[:, 0]):
        np.testing.assert_allclose(x @ a.numpy(), x @ b.numpy(), atol=1e-6 * y.std())
    assert (searched.coefficients >= 0).all()


def test_it_takes_no_proximal_step_and_several_targets_are_as_many_searches():
    x, y = rows("wide", "none")
    both = torch.from_numpy(np.stack([y, x[:, 7]], axis=1))
    problem = LinearProblem(torch.from_numpy(x), both, "squared", outputs=2)
    found = solve(problem, FeaturePenalty.of(tk.L1(0.1), 2, x.shape[1]))
    assert found.steps == 0 and (found.weight != 0).any(1).all()
    alone = LinearProblem(torch.from_numpy(x), both[:, :1], "squared", outputs=1)
    first = solve(alone, FeaturePenalty.of(tk.L1(0.1), 1, x.shape[1]))
    torch.testing.assert_close(found.weight[:1], first.weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize("limit", ["MAX_UNKNOWNS", "_MAX_STORED", "_ROUNDS"])
def test_what_it_does_not_finish_is_left_to_proximal_steps(limit, monkeypatch):
    x, y = rows("wide", "none")
    usual = tk.path(None, (x, y), tk.L1(), strengths=6)
    monkeypatch.setattr(active_set, limit, 1)
    other = tk.path(None, (x, y), tk.L1(), strengths=6)
    torch.testing.assert_close(other.coefficients, usual.coefficients, atol=1e-6, rtol=0)


def test_a_singular_system_is_not_guessed_at():
    x = np.ones((4, 2))
    gram = Gram(x, np.ones((4, 1)))
    none = np.zeros(2)
    assert (
        minimize_on_active_set(gram, 0, none, none, none, tolerance=1e-9, positive=False) is None
    )
