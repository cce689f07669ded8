"""Every penalty of the library: its own solution, held to proximal steps, or a refusal by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

from tikhon import penalties
from tikhon.errors import InputError
from tikhon.models.mlp import MLP
from tikhon.paths.linear import LinearProblem
from tikhon.paths.path import path
from tikhon.paths.solver import solve
from tikhon.paths.stability import stability
from tikhon.penalties import penalty_names

ROWS, FEATURES = 80, 12


def data(kind="squared", outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    noise = torch.randn(ROWS, outputs, generator=generator, dtype=torch.float64)
    weight = torch.zeros(FEATURES, outputs, dtype=torch.float64)
    weight[:4] = torch.linspace(-2, 2, 4 * outputs, dtype=torch.float64).view(4, outputs)
    y = x @ weight + (0.5 if kind == "squared" else 2.0) * noise
    if kind == "squared":
        return x, y
    cuts = [0.0] if kind == "logistic" else [-1.0, 1.0]
    return x, torch.bucketize(y[:, 0], torch.tensor(cuts, dtype=torch.float64))


@dataclass
class Objective:
    """Mean loss and gradient by autograd: nothing of the path's own code."""

    x: torch.Tensor
    y: torch.Tensor
    kind: str
    rows: torch.Tensor

    def loss(self, weight, bias):
        z = self.x @ weight.T + bias
        if self.kind == "squared":
            each = 0.5 * (z - self.y).square().sum(1)
        elif self.kind == "logistic":
            each = nn.functional.softplus(z[:, 0]) - z[:, 0] * self.y
        else:
            each = nn.functional.cross_entropy(z, self.y, reduction="none")
        return (self.rows * each).sum() / self.rows.sum()

    def step(self, see, unsee, penalty, weight, bias, size, positive=False):
        """One step of ISTA with the penalty's own prox."""
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        g, h = torch.autograd.grad(self.loss(weight, bias), (weight, bias))
        moved = weight.detach() - size * g
        moved = moved.clamp_min(0) if positive else moved
        return unsee(penalty.prox(see(moved), size)), bias.detach() - size * h


def as_they_are(weight):
    return weight


def one_row_a_feature(weight):
    return weight.T


def one_row(weight):
    return weight.reshape(1, -1)


FACTORS = torch.linspace(0.5, 2, FEATURES, dtype=torch.float64)
LAWS: dict[str, tuple[Any, Any]] = {
    "l1": (penalties.L1(), as_they_are),
    "l1 with factors": (penalties.L1(weights=FACTORS), as_they_are),
    "elastic_net": (penalties.ElasticNet(l1_ratio=0.3), as_they_are),
    "mcp": (penalties.MCP(), as_they_are),
    "scad": (penalties.SCAD(), as_they_are),
    "log_sum": (penalties.LogSum(), as_they_are),
    "group_lasso": (penalties.GroupLasso(), one_row_a_feature),
    "group_lasso with factors": (penalties.GroupLasso(weights=FACTORS), one_row_a_feature),
    "group_lasso by size": (penalties.GroupLasso(scale_by_size=True), one_row_a_feature),
    "sparse_group_lasso": (penalties.SparseGroupLasso(l1_ratio=0.4), one_row_a_feature),
    "group_mcp": (penalties.GroupMCP(), one_row_a_feature),
    "l_inf": (penalties.LInf(), one_row_a_feature),
    "slope": (penalties.SLOPE(), one_row),
    "total_variation": (penalties.TotalVariation(), as_they_are),
    "nuclear_norm": (penalties.NuclearNorm(), as_they_are),
    "spectral_norm": (penalties.SpectralNorm(), as_they_are),
}
REFUSED = {
    "l2": "L2 gives no zeros",
    "huber": "Huber gives no zeros",
    "orthogonal": "Orthogonal gives no zeros",
    "hierarchical": "Hierarchical ties the first layer of a network",
}
KINDS = [("squared", 1), ("squared", 3), ("logistic", 1), ("multinomial", 3)]


def test_every_penalty_of_the_library_is_solved_or_refused_by_name():
    x, y = data()
    for name, penalty in penalty_names().items():
        if name in LAWS:
            continue
        made = penalty()
        message = REFUSED.get(name, f"{type(made).__name__} is a constraint")
        assert made.constraint or name in REFUSED
        with pytest.raises(InputError, match=message):
            path(None, (x, y), made, strengths=[0.1])


SLOW = {"total_variation", "nuclear_norm", "spectral_norm"}  # no Newton steps: squared loss alone
CASES = [
    (name, kind, outputs, weighted)
    for name in LAWS
    for kind, outputs in KINDS
    for weighted in (False, True)
    if (name not in SLOW or (kind == "squared" and weighted)) and (not weighted or outputs == 3)
]


@pytest.mark.parametrize(("name", "kind", "outputs", "weighted"), CASES)
def test_the_solution_is_where_its_own_proximal_steps_end(name, kind, outputs, weighted):
    penalty, see = LAWS[name]
    x, y = data(kind, outputs if kind == "squared" else 1)
    rows = torch.arange(1, ROWS + 1).double() / ROWS if weighted else torch.ones(ROWS).double()
    strengths = [0.15, 0.03]
    found = path(
        None, (x, y), penalty, strengths=strengths, sample_weight=rows if weighted else None
    )
    size = 0.9 / float(torch.linalg.eigvalsh(x.T @ (rows[:, None] * x) / rows.sum()).max() + 1)
    objective = Objective(x, y, kind, rows)

    def unsee(view):
        return view.T if see is one_row_a_feature else view.reshape(outputs, FEATURES)

    for k, strength in enumerate(strengths):
        own = penalty.with_strength(strength)
        weight, bias = found.coefficients[k], found.intercepts[k]
        stays = objective.step(see, unsee, own, weight, bias, size)
        assert (stays[0] - weight).abs().max() < 1e-7 and (stays[1] - bias).abs().max() < 1e-7
        if not penalty.convex or k:
            continue  # of several minima each is one
        other = torch.zeros_like(weight), torch.zeros_like(bias)
        for _ in range(100):
            other = objective.step(see, unsee, own, *other, size)
        values = [
            float(objective.loss(w, b) + own.value(see(w))) for w, b in ((weight, bias), other)
        ]
        assert values[0] <= values[1] + 1e-9 * abs(values[1])


@pytest.mark.parametrize("name", ["l1", "elastic_net", "mcp", "group_lasso", "slope", "l_inf"])
def test_positive_solutions_are_where_their_proximal_steps_end(name):
    penalty, see = LAWS[name]
    x, y = data(outputs=2)
    found = path(None, (x, y), penalty, strengths=[0.2, 0.05], positive=True)
    objective = Objective(x, y, "squared", torch.ones(ROWS).double())
    for k, strength in enumerate(found.strengths):
        weight, bias = found.coefficients[k], found.intercepts[k]
        assert (weight >= 0).all() and (weight > 0).any()
        stays = objective.step(
            see,
            lambda v: v.T if see is one_row_a_feature else v.reshape(2, FEATURES),
            penalty.with_strength(strength),
            weight,
            bias,
            0.3,
            positive=True,
        )
        assert (stays[0] - weight).abs().max() < 1e-8
    first = path(None, (x, y), penalty, strengths=2, positive=True).strengths[0]
    around = path(None, (x, y), penalty, strengths=[first * 1.001, first * 0.99], positive=True)
    assert around.counts[0] == 0 and around.counts[1] > 0


def test_positive_lasso_is_scikit_learns():
    x, y = data()
    found = path(None, (x, y), penalties.L1(), strengths=[0.1], positive=True)
    other = Lasso(alpha=0.1, positive=True, tol=1e-12).fit(x, y[:, 0])
    assert np.abs(found.coefficients[0, 0].numpy() - other.coef_).max() < 1e-8


@pytest.mark.parametrize("kind", ["squared", "logistic", "multinomial"])
def test_a_row_of_weight_two_is_two_rows_and_of_weight_zero_none(kind):
    x, y = data(kind)
    often = torch.arange(ROWS) % 3
    found = path(None, (x, y), penalties.L1(), strengths=6, sample_weight=often)
    index = torch.arange(ROWS).repeat_interleave(often)
    repeated = path(None, (x[index], y[index]), penalties.L1(), strengths=6)
    assert found.strengths == pytest.approx(repeated.strengths)
    assert torch.allclose(found.coefficients, repeated.coefficients, atol=1e-7)
    assert torch.allclose(found.intercepts, repeated.intercepts, atol=1e-6)


def test_weights_of_rows_count_in_the_scores_too():
    x, y = data()
    spoilt = y.clone()
    spoilt[::4] += 100.0
    weights = torch.ones(ROWS)
    weights[::4] = 0.0
    clean = path(None, (x, spoilt), penalties.L1(), folds=4, strengths=10, sample_weight=weights)
    assert max(clean.scores) < 50
    with pytest.raises(InputError, match="one entry a row"):
        path(None, (x, y), penalties.L1(), sample_weight=torch.ones(3))
    with pytest.raises(InputError, match=">= 0"):
        path(None, (x, y), penalties.L1(), sample_weight=-weights)


def test_a_feature_of_factor_zero_is_in_from_the_start():
    x, y = data()
    factors = torch.ones(FEATURES)
    factors[7] = 0.0
    for penalty in (penalties.L1(weights=factors), penalties.GroupLasso(weights=factors)):
        found = path(None, (x, y), penalty, strengths=10)
        assert found.counts[0] == 1 and found.supports[:, 7].all()
        assert found.counts[1] > 1  # the first strength is where another one enters


@pytest.mark.parametrize("kind", ["squared", "logistic", "multinomial"])
def test_strength_zero_is_the_model_without_a_penalty(kind):
    x, y = data(kind)
    found = path(None, (x, y), penalties.L1(), strengths=[0])
    assert found.chosen == 0 and found.counts == [FEATURES]
    objective = Objective(x, y, kind, torch.ones(ROWS).double())
    weight, bias = found.coefficients[0].requires_grad_(), found.intercepts[0].requires_grad_()
    gradients = torch.autograd.grad(objective.loss(weight, bias), (weight, bias))
    assert max(float(g.abs().max()) for g in gradients) < 1e-7


LABELS = {
    "two signs": ([-1, 1], "logistic"),
    "with gaps": ([-7, 3, 400], "multinomial"),
}


@pytest.mark.parametrize("labels", LABELS)
def test_labels_do_not_change_the_answer(labels):
    names, kind = LABELS[labels]
    x, codes = data(kind)
    y = torch.tensor(names)[codes]
    found = path(None, (x, y), penalties.L1(), strengths=3, folds=2)
    plain = path(None, (x, codes), penalties.L1(), strengths=3, folds=2)
    assert found.classes == tuple(names) and found.to_dict()["classes"] == names
    assert torch.equal(found.coefficients, plain.coefficients)
    assert found.scores == plain.scores
    held_out = path(None, (x, y), penalties.L1(), strengths=3, valid=(x[:20], y[:20]))
    assert all(np.isfinite(held_out.scores))
    picked = stability((x, y), draws=2, strengths=3)
    assert torch.equal(picked.frequencies, stability((x, codes), draws=2, strengths=3).frequencies)


def test_integers_that_are_no_classes_are_named():
    x, y = data()
    with pytest.raises(InputError, match="for a regression give them as floating point"):
        path(None, (x, (1000 * y[:, 0]).long()), penalties.L1())
    with pytest.raises(InputError, match="the targets must be 0 to 2"):
        path(lambda: nn.Linear(FEATURES, 3), (x, torch.arange(ROWS) % 3 - 1), penalties.L1())


@pytest.mark.parametrize(
    ("penalty", "arguments", "message"),
    [
        (penalties.TotalVariation(), {}, "no strength of TotalVariation"),
        (penalties.ElasticNet(l1_ratio=0.0), {}, "no strength of ElasticNet"),
        (penalties.L1(weights=torch.ones(5)), {}, "does not broadcast"),
        (penalties.GroupLasso(weights=torch.ones(5)), {}, "one factor for each of the 12"),
        (penalties.SLOPE(weights=torch.ones(5)), {}, "must have 12 entries"),
        (penalties.TotalVariation(), {"positive": True, "strengths": [1.0]}, "TotalVariation"),
        (penalties.L1(), {"positive": True, "debias": True}, "debias"),
        (penalties.L1(weights=FACTORS), {"strengths": "universal"}, "universal"),
        (penalties.SLOPE(), {"strengths": "universal"}, "not for this SLOPE"),
        (penalties.L1(), {"strengths": ["a"]}, "must be numbers"),
        (penalties.L1(), {"select": "worst"}, "unknown select"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, penalties.Penalty) else "",
)
def test_what_cannot_be_solved_is_refused_by_name(penalty, arguments, message):
    with pytest.raises(InputError, match=message):
        path(None, data(), penalty, **arguments)


@pytest.mark.parametrize("kind", ["squared", "logistic", "multinomial"])
@pytest.mark.parametrize("form", [list, np.asarray, pd.Series, torch.as_tensor])
def test_rows_of_weight_zero_are_not_there(kind, form):
    """In folds, classes and strengths too; whatever form the weights have."""
    x, y = data(kind)
    counted = torch.ones(ROWS, dtype=torch.float64)
    counted[::3] = 0
    kept = counted > 0
    if kind != "squared":
        y = torch.where(kept, y, 7)  # a class that no row of weight holds
    weights = counted.tolist() if form is list else form(counted.numpy())
    given = {"strengths": 4, "folds": 3, "smallest": 0.05}
    found = path(None, (x, y), penalties.L1(), sample_weight=weights, **given)
    plain = path(None, (x[kept], y[kept]), penalties.L1(), **given)
    assert found.classes == plain.classes and found.counts == plain.counts
    assert found.scores == pytest.approx(plain.scores, rel=1e-5)
    assert torch.allclose(found.coefficients, plain.coefficients, atol=1e-9)


def test_separable_classes_without_a_penalty_are_told():
    x, _ = data()
    first = x[:, 0]
    for y in ((first > 0).long(), (first > -1).long() + (first > 1).long()):
        with pytest.warns(UserWarning, match="the classes are separable") as caught:
            path(None, (x, y), penalties.L1(), strengths=[0.1, 0.0])
        assert __file__ in {w.filename for w in caught if "separable" in str(w.message)}


def test_a_solution_that_is_none_is_told(monkeypatch):
    short = functools.partial(solve, max_steps=0)
    monkeypatch.setattr("tikhon.paths.linear_path.solve", short)
    with pytest.warns(UserWarning, match="1 of 2 solutions of SLOPE did not converge") as caught:
        path(None, data(), penalties.SLOPE(), strengths=[1000.0, 0.01])
    assert caught[0].filename == __file__


def test_factors_of_a_network_decide_which_feature_stays():
    x, y = data("logistic")
    factors = torch.ones(FEATURES)
    factors[0] = 100.0
    build = lambda: MLP([FEATURES, 8, 2])  # noqa: E731
    for penalty in (penalties.GroupLasso, penalties.Hierarchical):
        found = path(build, (x, y), penalty(weights=factors), strengths=100)
        last = max(k for k, count in enumerate(found.counts) if count > 2)
        assert not found.supports[last, 0]
        with pytest.raises(InputError, match="one for each of the 12 features"):
            path(build, (x, y), penalty(weights=torch.ones(3)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "outputs"), KINDS)
def test_curvature_is_the_second_derivative_of_the_loss(kind, outputs, weighted):
    x, y = data(kind, outputs if kind == "squared" else 1)
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(ROWS, generator=generator) if weighted else None
    problem = LinearProblem(x, y, kind, outputs=outputs, weights=rows)
    columns = torch.tensor([0, 2, 3, 7])
    weight = torch.randn(outputs, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    free = torch.rand(outputs, 4, generator=generator) > 0.3

    def loss(theta):
        part = weight.masked_scatter(free, theta[:-outputs])
        return problem.loss(part, theta[-outputs:], columns)

    expected = torch.autograd.functional.hessian(loss, torch.cat([weight[free], bias]))
    torch.testing.assert_close(problem.hessian(weight, bias, columns, free), expected)
