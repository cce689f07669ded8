"""Penalties against implementations that share no code with them."""

from __future__ import annotations

import math

import celer
import numpy as np
import pytest
import skglm.penalties
import torch
from celer.dropin_sklearn import Lasso as CelerLasso
from scipy.optimize import isotonic_regression, lsq_linear
from skglm.utils import prox_funcs
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso, Ridge

from oracles import best_by_scipy, least_squares, projection_by_scipy, proximal_gradient
from tikhon import penalties as tk
from tikhon.penalties.ordered import _nonincreasing
from tikhon.testing import objective

CONVEX = [
    tk.L1(0.1),
    tk.L2(0.1),
    tk.ElasticNet(0.1),
    tk.Huber(0.1, delta=0.3),
    tk.GroupLasso(0.2),
    tk.SparseGroupLasso(0.2),
    tk.LInf(0.2),
    tk.NuclearNorm(0.3),
    tk.SpectralNorm(0.3),
    tk.SLOPE(0.05),
    tk.TotalVariation(0.1),
    tk.MaxNorm(0.5),
    tk.NonNegative(),
    tk.Box(-0.3, 0.3),
    tk.Simplex(0.8),
    tk.L1Ball(0.8),
    tk.L2Ball(0.8),
    tk.SpectralBall(0.8),
]


def name(penalty) -> str:
    return type(penalty).__name__


def same(found: torch.Tensor, expected, tolerance: float = 1e-6) -> None:
    expected = torch.as_tensor(np.asarray(expected), dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# -- solutions of whole problems ------------------------------------------------------------------


@pytest.mark.parametrize("penalty", CONVEX, ids=name)
def test_convex_problems_are_solved_to_the_residual(penalty):
    x, y = least_squares(features=6, outputs=4)
    w, residual = proximal_gradient(x, y, penalty)
    assert residual < 1e-8
    if penalty.diagonal:
        again, residual = proximal_gradient(x, y, penalty, metric=True)
        assert residual < 1e-8
        same(again, w, 1e-8)


def test_l1_is_scikit_learns_lasso_and_celers():
    x, y = least_squares()
    w, _ = proximal_gradient(x, y, tk.L1(0.1))
    same(w, Lasso(0.1, fit_intercept=False, tol=1e-12).fit(x, y).coef_)
    same(w, CelerLasso(0.1, fit_intercept=False, tol=1e-12).fit(x, y).coef_)


def test_weighted_l1_is_celers_weighted_lasso():
    x, y = least_squares()
    factors = torch.linspace(0.2, 3.0, 12, dtype=x.dtype)
    w, _ = proximal_gradient(x, y, tk.L1(0.1, weights=factors))
    peer = CelerLasso(0.1, weights=factors.numpy(), fit_intercept=False, tol=1e-12)
    same(w, peer.fit(x.numpy(), y.numpy()).coef_)


def test_l2_is_scikit_learns_ridge_times_m():
    x, y = least_squares()
    w, _ = proximal_gradient(x, y, tk.L2(0.1))
    same(w, Ridge(len(x) * 0.1, fit_intercept=False, tol=1e-12).fit(x, y).coef_)


def test_elastic_net_is_scikit_learns():
    x, y = least_squares()
    w, _ = proximal_gradient(x, y, tk.ElasticNet(0.2, l1_ratio=0.7))
    peer = ElasticNet(0.2, l1_ratio=0.7, fit_intercept=False, tol=1e-12)
    same(w, peer.fit(x, y).coef_)


def test_group_lasso_is_scikit_learns_multi_task_lasso():
    x, y = least_squares(outputs=3)
    w, _ = proximal_gradient(x, y, tk.GroupLasso(0.3))
    same(w, MultiTaskLasso(0.3, fit_intercept=False, tol=1e-12).fit(x, y).coef_.T)


def test_group_lasso_is_celers():
    x, y = least_squares()
    columns = x.reshape(len(x), 4, 3)  # group g holds features 3g, 3g+1, 3g+2
    grouped = tk.GroupLasso(0.2, scale_by_size=False)

    class OnGroups(tk.GroupLasso):
        """The same groups for a coefficient vector."""

        def prox(self, w, step):
            return grouped.prox(w.reshape(4, 3), step).reshape(-1)

    w, _ = proximal_gradient(columns.reshape(len(x), 12), y, OnGroups(0.2))
    peer = celer.GroupLasso(groups=3, alpha=0.2, fit_intercept=False, tol=1e-12)
    same(w, peer.fit(x.numpy(), y.numpy()).coef_)


# -- single proxes --------------------------------------------------------------------------------

ENTRIES = torch.linspace(-5, 5, 401, dtype=torch.float64)


@pytest.mark.parametrize("step", [0.3, 1.0, 1.7])
def test_concave_proxes_are_skglms(step):
    def each(function, *args):
        return [function(entry, *args) for entry in ENTRIES.tolist()]

    same(tk.MCP(1.0, gamma=2.5).prox(ENTRIES, step), each(prox_funcs.prox_MCP, step, 1.0, 2.5))
    same(tk.SCAD(1.0, a=3.7).prox(ENTRIES, step), each(prox_funcs.prox_SCAD, step, 1.0, 3.7))
    log_sum = tk.LogSum(0.8, epsilon=1.5).prox(ENTRIES, step)
    same(log_sum, each(prox_funcs.prox_log_sum, 0.8 * step, 1.5))


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("step", [0.1, 0.5, 2.0])
def test_the_log_sum_prox_is_the_lowest_of_a_fine_grid(step, epsilon):
    penalty = tk.LogSum(0.4, epsilon=epsilon)
    grid = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    costs = (grid - ENTRIES[:, None]).square() / (2 * step)
    costs += 0.4 * torch.log1p(grid.abs() / epsilon)
    found = penalty.prox(ENTRIES, step)
    cost = (found - ENTRIES).square() / (2 * step) + 0.4 * torch.log1p(found.abs() / epsilon)
    assert (cost <= costs.amin(1) + 1e-12).all()


def test_group_mcp_is_skglms_block_mcp():
    w = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peer = skglm.penalties.BlockMCPenalty(0.8, 2.5)
    expected = [peer.prox_1feat(row, 0.7, 0) for row in w.numpy()]
    same(tk.GroupMCP(0.8, gamma=2.5).prox(w, 0.7), expected)
    assert tk.GroupMCP(0.8, gamma=2.5).value(w).item() == pytest.approx(peer.value(w.numpy()))


def test_slope_is_skglms():
    w = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sequence = torch.linspace(2, 0.1, 300, dtype=torch.float64)
    peer = skglm.penalties.SLOPE(sequence.numpy(), 0.3)
    slope = tk.SLOPE(0.3, weights=sequence)
    same(slope.prox(w, 0.9), peer.prox_vec(w.numpy(), 0.9), 1e-12)
    assert slope.value(w).item() == pytest.approx(peer.value(w.numpy()))


def test_pooling_is_scipys_isotonic_regression():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = isotonic_regression(values.numpy(), increasing=False).x
    same(_nonincreasing(values[None])[0], expected.copy(), 1e-12)


@pytest.mark.parametrize("size", [2, 3, 17, 60])
def test_total_variation_is_its_dual_least_squares(size):
    source = torch.Generator().manual_seed(size)
    w = torch.randn(2, size, generator=source, dtype=torch.float64).cumsum(1)
    difference = np.diff(np.eye(size), axis=0)
    for row, found in zip(w.numpy(), tk.TotalVariation(0.7).prox(w, 1.0)):
        dual = lsq_linear(difference.T, row, bounds=(-0.7, 0.7), method="bvls", tol=1e-14).x
        same(found, row - difference.T @ dual, 1e-10)


def test_hierarchical_is_lassonets_prox():
    lassonet = pytest.importorskip("lassonet.prox", reason="pip install lassonet")
    source = torch.Generator().manual_seed(0)
    w = torch.randn(40, 8, generator=source, dtype=torch.float64)
    for m, strength in ((0.1, 0.5), (1.0, 1.5), (10.0, 4.0)):
        found = tk.Hierarchical(strength, M=m, skip=3).prox(w, 1.0)
        head, tail = lassonet.prox(w[:, :3].T, w[:, 3:].T, lambda_=strength, lambda_bar=0.0, M=m)
        same(found, torch.cat([head, tail]).T, 1e-10)


def test_a_feature_without_skip_weights_that_stays_gets_its_skip_on_the_first_output():
    w = torch.tensor([[0.0, 0.0, 3.0, -1.0], [2.0, 0.0, 3.0, -1.0]], dtype=torch.float64)
    penalty = tk.Hierarchical(0.1, M=1.0, skip=2)
    found = penalty.prox(w, 1.0)
    assert found[0, 0] > 0 and found[0, 1] == 0
    assert found[0, 2:].abs().max() == pytest.approx(float(found[0, 0]))  # M times its skip

    def cost(row: torch.Tensor) -> float:
        return float((row - w[0]).square().sum() / 2 + penalty.value(row[None]))

    without = torch.cat([torch.zeros(4, dtype=torch.float64)])
    assert cost(found[0]) < cost(without)


def test_a_step_of_zero_holds_an_entry_of_a_row_still():
    w = torch.tensor([[3.0, -2.0, 1.0], [0.5, 4.0, -4.0]], dtype=torch.float64)
    step = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    found = tk.LInf(0.5).prox(w, step)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[step == 0], w[step == 0])
    torch.testing.assert_close(found, tk.LInf(0.5).prox(w, step.clamp_min(1e-12)))


METRIC_GROUPS = [
    tk.GroupLasso(0.5),
    tk.SparseGroupLasso(0.5, l1_ratio=0.3),
    tk.LInf(0.7),
    tk.GroupMCP(0.6, gamma=2.0),
    tk.Hierarchical(0.6, M=1.0),
    tk.NuclearNorm(0.5),
    tk.SLOPE(0.4),
]


@pytest.mark.parametrize("penalty", METRIC_GROUPS, ids=name)
def test_group_proxes_are_not_beaten_by_scipy(penalty):
    source = torch.Generator().manual_seed(3)
    w = torch.randn(1, 3, generator=source, dtype=torch.float64) * 2
    metric = torch.tensor([[0.1, 0.9, 3.0]], dtype=torch.float64)
    for step in (0.7, metric) if penalty.diagonal else (0.7,):
        best = objective(penalty, penalty.prox(w, step), w, step).item()
        assert best <= best_by_scipy(penalty, w, step) + 1e-9


@pytest.mark.parametrize(
    ("constraint", "limit"),
    [
        (
            tk.Simplex(1.5),
            {"type": "eq", "fun": lambda x: x.sum() - 1.5, "bounds": [(0, None)] * 5},
        ),
        (tk.L2Ball(1.2), {"type": "ineq", "fun": lambda x: 1.44 - (x**2).sum()}),
        (tk.MaxNorm(0.7), {"type": "ineq", "fun": lambda x: 0.49 - (x**2).sum()}),
        (tk.UnitNorm(), {"type": "eq", "fun": lambda x: (x**2).sum() - 1}),
        (tk.MinMaxNorm(0.2, 0.7), {"type": "ineq", "fun": lambda x: 0.49 - (x**2).sum()}),
        (tk.MinMaxNorm(9.0, 10.0), {"type": "ineq", "fun": lambda x: (x**2).sum() - 81}),
    ],
    ids=lambda value: name(value) if isinstance(value, tk.Penalty) else "",
)
def test_projections_in_a_metric_are_scipys(constraint, limit):
    source = torch.Generator().manual_seed(1)
    w = torch.rand(5, generator=source, dtype=torch.float64) * 2 + 0.1
    step = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    bounds = limit.pop("bounds", None)
    limit = {**limit, "bounds": bounds} if bounds else limit
    same(constraint.prox(w, step), projection_by_scipy(w, step, limit), 2e-5)


def keras_min_max_norm(w, low, high, rate, axis):
    """The formula of keras.constraints.MinMaxNorm, without its epsilon."""
    norms = np.sqrt(np.sum(np.square(w), axis=axis, keepdims=True))
    desired = rate * np.clip(norms, low, high) + (1 - rate) * norms
    return w * desired / norms


@pytest.mark.parametrize(
    ("low", "high", "rate"), [(0, 1, 1), (0.5, 2, 1), (1, 1.2, 0.3), (2, 2, 1)]
)
@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 2, 2), (4,)])
def test_min_max_norm_is_kerass(low, high, rate, shape):
    source = torch.Generator().manual_seed(3)
    w = torch.randn(shape, generator=source, dtype=torch.float64)
    w *= torch.logspace(-1, 1, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    axes = tuple(range(1, len(shape))) or 0
    kernel = np.moveaxis(w.numpy(), 0, -1)  # Keras stores inputs first
    expected = keras_min_max_norm(kernel, low, high, rate, tuple(range(len(shape) - 1)) or 0)
    moved = tk.MinMaxNorm(low, high, rate).prox(w, 0.3)
    same(moved, torch.from_numpy(np.moveaxis(expected, -1, 0).copy()), 1e-12)
    norms = moved.square().sum(axes).sqrt()
    assert rate < 1 or ((norms >= low - 1e-12) & (norms <= high + 1e-12)).all()


def test_min_max_norm_gives_a_zero_row_a_length():
    moved = tk.MinMaxNorm(1.0, 2.0).prox(torch.zeros(2, 4), 1.0)
    assert (moved == 0.5).all()


@pytest.mark.parametrize("bad", [(-0.1, 1), (2, 1), (0, 0), (0, 1, 0), (0, 1, 1.1), (0, math.nan)])
def test_min_max_norm_refuses_what_is_no_range(bad):
    with pytest.raises(ValueError, match=r"MinMaxNorm: .* received"):
        tk.MinMaxNorm(*bad)


# -- the largest strength -------------------------------------------------------------------------


def test_max_strength_is_the_closed_form_and_the_peers_alpha_max():
    x, y = least_squares()
    gradient = -(x.T @ y) / len(x)
    largest = gradient.abs().max().item()
    assert tk.max_strength(tk.L1(), gradient) == pytest.approx(largest, rel=1e-12)
    assert tk.max_strength(tk.MCP(gamma=0.5), gradient) == pytest.approx(largest, rel=1e-9)
    assert tk.max_strength(tk.SCAD(), gradient) == pytest.approx(largest, rel=1e-12)
    net = tk.max_strength(tk.ElasticNet(l1_ratio=0.25), gradient)
    assert net == pytest.approx(largest / 0.25, rel=1e-12)  # skglm's alpha_max omits the ratio
    peer = skglm.penalties.L1(1.0).alpha_max(gradient.numpy())
    assert tk.max_strength(tk.L1(), gradient) == pytest.approx(peer, rel=1e-12)
    alphas, _, _ = celer.celer_path(x.numpy(), y.numpy(), "lasso", n_alphas=2, eps=0.5)
    assert tk.max_strength(tk.L1(), gradient) == pytest.approx(alphas[0], rel=1e-9)


def test_max_strength_of_groups_and_of_matrices():
    x, y = least_squares(outputs=3)
    gradient = -(x.T @ y) / len(x)
    norms = gradient.norm(dim=1).max().item()
    assert tk.max_strength(tk.GroupLasso(), gradient) == pytest.approx(norms, rel=1e-12)
    dual = gradient.abs().sum(1).max().item()
    assert tk.max_strength(tk.LInf(), gradient) == pytest.approx(dual, rel=1e-9)
    spectral = torch.linalg.matrix_norm(gradient, 2).item()
    assert tk.max_strength(tk.NuclearNorm(), gradient) == pytest.approx(spectral, rel=1e-9)
    skip = gradient[:, 0].abs() + 2.0 * gradient[:, 1:].abs().sum(1)
    found = tk.max_strength(tk.Hierarchical(M=2.0), gradient)
    assert found == pytest.approx(skip.max().item(), rel=1e-9)


def test_max_strength_is_where_the_solution_vanishes():
    x, y = least_squares()
    gradient = -(x.T @ y) / len(x)
    for penalty in (tk.L1(), tk.ElasticNet(l1_ratio=0.6), tk.SLOPE(q=0.2)):
        largest = tk.max_strength(penalty, gradient)
        above, _ = proximal_gradient(x, y, penalty.with_strength(1.0001 * largest))
        below, _ = proximal_gradient(x, y, penalty.with_strength(0.999 * largest))
        assert not above.any() and below.any()


def test_max_strength_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="no strength of L2"):
        tk.max_strength(tk.L2(), torch.ones(3))
    with pytest.raises(ValueError, match="Box is a constraint"):
        tk.max_strength(tk.Box(), torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        tk.max_strength(tk.L1(), torch.tensor([1.0, torch.nan]))
    assert tk.max_strength(tk.L1(), torch.zeros(3)) == 0.0


@pytest.mark.parametrize("offset", [0.0, 10.0, 300.0])
def test_total_variation_of_long_rows_is_as_exact_as_their_numbers(offset):
    """Running sums of thousands of entries would decide otherwise which of them are equal."""
    w = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)) + offset
    found, exact = (tk.TotalVariation(1.0).prox(x, 1.0) for x in (w, w.double()))
    torch.testing.assert_close(found, exact.float(), rtol=3e-7, atol=1e-7)
    assert torch.equal(found.diff() == 0, exact.float().diff() == 0)
