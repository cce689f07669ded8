"""Paths against independent solvers, and the choices made on them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from tikhon.errors import InputError
from tikhon.models.mlp import MLP
from tikhon.paths.linear import LinearProblem
from tikhon.paths.path import path
from tikhon.paths.penalised import FeaturePenalty
from tikhon.paths.solver import refit, solve
from tikhon.paths.stability import stability
from tikhon.paths.targets import fold_rows
from tikhon.penalties import L1, L2, MCP, ElasticNet, GroupLasso, Hierarchical
from tikhon.runs.interrupt import Stopped

celer = pytest.importorskip("celer")


def standardised(shared_data, name):
    data = np.load(shared_data / f"{name}.npz")
    x = data["X"].astype(float)
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1), data["y"].astype(float)


def planted(rows=100, features=40, true=4, noise=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    w = torch.zeros(features, dtype=torch.float64)
    w[:true] = torch.tensor([2.0, -3.0, 1.5, 2.5], dtype=torch.float64)
    return x, x @ w + noise * torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["diabetes", "communities", "khan_srbct"])
def test_the_linear_path_equals_celer(shared_data, name):
    x, y = standardised(shared_data, name)
    result = path(None, (x, y), L1(), strengths=15, smallest=0.02)
    _, coefficients, _ = celer.celer_path(
        x - x.mean(0), y - y.mean(), "lasso", alphas=np.array(result.strengths), tol=1e-14,
        max_iter=1_000,
    )  # fmt: skip
    assert result.counts[0] == 0
    assert np.abs(result.coefficients[:, 0].numpy() - coefficients.T).max() < 1e-6


def test_the_logistic_path_equals_scikit_learn(shared_data):
    from sklearn.linear_model import LogisticRegression

    x, y = standardised(shared_data, "sonar")
    y = y.astype(int)
    result = path(None, (x, y), L1(), strengths=[0.05, 0.02])
    for k, strength in enumerate(result.strengths):
        other = LogisticRegression(
            l1_ratio=1.0, C=1 / (strength * len(x)), solver="saga", tol=1e-9, max_iter=20_000
        ).fit(x, y)
        assert np.abs(result.coefficients[k].numpy() - other.coef_).max() < 1e-5
        assert abs(float(result.intercepts[k]) - other.intercept_[0]) < 1e-5


def test_the_elastic_net_path_equals_scikit_learn():
    from sklearn.linear_model import ElasticNet as Reference

    x, y = planted()
    result = path(None, (x, y), ElasticNet(l1_ratio=0.4), strengths=[0.8, 0.1])
    for k, strength in enumerate(result.strengths):
        other = Reference(alpha=strength, l1_ratio=0.4, tol=1e-12, max_iter=100_000).fit(x, y)
        assert np.abs(result.coefficients[k, 0].numpy() - other.coef_).max() < 1e-8


def test_just_above_the_first_strength_the_model_is_empty_and_just_below_it_is_not():
    x, y = planted()
    first = path(None, (x, y), L1(), strengths=2).strengths[0]
    assert path(None, (x, y), L1(), strengths=[first * 1.0001, first * 0.999]).counts == [0, 1]


def test_a_model_given_back_predicts_like_its_coefficients():
    x, y = planted()
    result = path(lambda: nn.Linear(40, 1), (x, y), L1(), strengths=10, folds=5, select="best")
    expected = x @ result.coefficients[result.chosen, 0] + result.intercepts[result.chosen]
    found = result.model()(x.float()).squeeze(1)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_one_standard_error_is_sparser_than_the_best_and_debiasing_refits_least_squares():
    x, y = planted()
    result = path(None, (x, y), L1(), strengths=30, folds=5, debias=True)
    assert result.counts[result.one_se] <= result.counts[result.best]
    assert result.supports[result.one_se].nonzero().flatten().tolist() == [0, 1, 2, 3]
    columns = np.column_stack([x[:, :4], np.ones(len(x))])
    exact = np.linalg.lstsq(columns, y.numpy(), rcond=None)[0]
    assert np.abs(result.coefficients[result.one_se, 0, :4].numpy() - exact[:4]).max() < 1e-5


def test_validation_scores_are_mean_losses_of_the_rows():
    x, y = planted()
    result = path(None, (x[:60], y[:60]), L1(), valid=(x[60:], y[60:]), strengths=5)
    k = 3
    z = x[60:] @ result.coefficients[k, 0] + result.intercepts[k]
    losses = 0.5 * (z - y[60:]) ** 2
    assert result.scores[k] == pytest.approx(float(losses.mean()))
    assert result.errors[k] == pytest.approx(float(losses.std() / 40**0.5))


@pytest.mark.parametrize("seed", range(3))
def test_the_universal_threshold_needs_no_validation(seed):
    x, y = planted(features=200, seed=seed)
    found = path(None, (x, y), L1(), strengths="universal")
    assert found.supports[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(seed))
    assert path(None, (x, noise), L1(), strengths="universal").counts[0] <= 1


def test_the_universal_threshold_of_classes():
    x, y = planted(rows=200, features=100)
    found = path(None, (x, (y > 0).long()), L1(), strengths="universal")
    support = set(found.supports[0].nonzero().flatten().tolist())
    assert {0, 1} <= support <= {0, 1, 2, 3}


def test_one_validation_row_has_no_error_and_the_best_is_chosen():
    x, y = planted()
    result = path(None, (x, y), L1(), strengths=6, valid=(x[:1], y[:1]))
    assert math.isnan(result.errors[0]) and result.one_se == result.best == result.chosen


@pytest.mark.parametrize("given", [{"strengths": 0}, {"smallest": 2.0}])
def test_stability_refuses_what_a_path_refuses(given):
    with pytest.raises(InputError, match=next(iter(given))):
        stability(planted(), draws=2, **given)


def test_stability_selection_finds_the_planted_features_and_bounds_the_false_ones():
    x, y = planted(features=100, noise=1.0)
    found = stability((x, y), draws=20)
    assert found.selected.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert found.frequencies.shape == (20, 100) and found.bound >= 0
    assert torch.equal(found.highest, stability((x, y), draws=20).highest)


def test_mcp_is_less_biased_than_l1():
    x, y = planted(noise=0.1)
    problem = LinearProblem(x, y, "squared", outputs=1)
    lasso = solve(problem, FeaturePenalty.of(L1(0.3), 1, 40))
    mcp = solve(problem, FeaturePenalty.of(MCP(0.3), 1, 40), start=lasso)
    exact = refit(problem, lasso.weight != 0).weight
    assert (mcp.weight - exact).abs().max() < 0.1 * (lasso.weight - exact).abs().max()


def circles(rows=300, noise=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2 + noise, generator=generator)
    return x, (x[:, 0] ** 2 + x[:, 1] ** 2 > 1.4).long()


@pytest.mark.parametrize("penalty", [Hierarchical(), GroupLasso()])
def test_a_network_path_keeps_the_features_that_a_linear_model_cannot_see(penalty):
    x, y = circles()
    result = path(
        lambda: MLP([8, 32, 2]), (x[:200], y[:200]), penalty, valid=(x[200:], y[200:]), seed=0
    )
    counts = result.counts
    assert counts[0] == 8 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    two = counts.index(2)
    assert set(result.supports[two].nonzero().flatten().tolist()) == {0, 1}
    assert result.counts[result.chosen] == 2
    accuracy = (result.model(two)(x[200:]).argmax(1) == y[200:]).float().mean()
    assert accuracy > 0.9


def test_a_feature_that_is_off_has_no_influence():
    x, y = circles()
    result = path(lambda: MLP([8, 32, 2]), (x, y), Hierarchical(), strengths=6)
    assert len(result.strengths) <= 6
    index = next(i for i, count in enumerate(result.counts) if 0 < count < 8)
    model, off = result.model(index), ~result.supports[index]
    changed = x.clone()
    changed[:, off] += 100.0
    assert torch.equal(model(x), model(changed))


def test_a_plot_draws_curves_and_scores():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    x, y = planted()
    result = path(None, (x, y), L1(), strengths=10, folds=3)
    display = result.plot()
    assert len(display.axes_[0].lines) == 40
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": L2()}, "zeros|prox"),
        ({"folds": 1}, "at least 2"),
        ({"folds": 500}, "need at least 500 rows"),
        ({"strengths": 0}, "positive number"),
        ({"strengths": [0.1, -1.0]}, r"\[-1.0\]"),
        ({"strengths": []}, "none"),
        ({"strengths": "auto"}, "'universal'"),
        ({"smallest": 2.0}, "ratio"),
        ({"folds": 2.5}, "whole number of at least 2"),
        ({"feature_names": ["a"]}, "1 names for 40 features"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    x, y = planted()
    given = {"penalty": L1(), **arguments}
    with pytest.raises(ValueError, match=message):
        path(None, (x, y), given.pop("penalty"), **given)


def test_a_class_with_fewer_rows_than_folds_trains_in_all_of_them():
    y = torch.arange(100) % 2
    y[[3, 50, 81]] = 2
    with pytest.warns(UserWarning, match=r"fewer rows than there are folds \(\d+\): 2;"):
        cuts = fold_rows(y, 5, 0)
    assert all({3, 50, 81} <= set(train.tolist()) for train, _ in cuts)
    held = torch.cat([test for _, test in cuts])
    assert sorted(held.tolist()) == [i for i in range(100) if y[i] < 2]
    with pytest.raises(InputError, match="need two classes of 5 rows or more"):
        fold_rows(torch.tensor([0] * 20 + [1] * 3), 5, 0)


def test_classes_that_cannot_be_scored_are_refused():
    x, _ = planted()
    y = torch.zeros(100, dtype=torch.long)
    with pytest.raises(InputError, match="single class"):
        path(None, (x, y), L1())
    y[:50] = 1
    with pytest.raises(InputError, match="valid holds classes that train lacks: 2"):
        path(None, (x, y), L1(), valid=(x, y + 1))
    y[:3] = 2
    with pytest.raises(InputError, match="switches features off"):
        path(lambda: MLP([40, 8, 3]), (x, y), L1())
    with pytest.raises(InputError, match="not scored"):
        _ = path(None, planted(), L1(), strengths=3).best


def test_progress_counts_every_solution_of_every_fold():
    x, y = planted()
    seen = []
    path(None, (x, y), L1(), strengths=4, folds=3, on_progress=seen.append)
    assert seen == [pytest.approx((k + 1) / 16) for k in range(16)]


def test_a_network_that_has_its_linear_map_already_gets_no_second_one():
    from tikhon.models import build

    x, y = planted(rows=80, features=8)
    data = (x.float(), (y > 0).long())
    named = lambda: build("skip:mlp:8", (8,), 2)  # noqa: E731
    result = path(named, data, Hierarchical(), strengths=3)
    assert set(result.states[0]) == set(named().state_dict())


def test_each_strength_of_a_network_ends_with_its_lowest_validation_loss():
    x, y = planted(rows=60, features=8)
    y = (y > 0).long()
    train, valid = (x[:40].float(), 1 - y[:40]), (x[40:].float(), y[40:])  # to learn is to fail
    build = lambda: MLP([8, 16, 2])  # noqa: E731

    def losses(result):
        models = (result.model(k)(valid[0]) for k in range(len(result.scores)))
        return [nn.functional.cross_entropy(output, valid[1]).item() for output in models]

    stopped = path(build, train, GroupLasso(), valid=valid, strengths=4)
    trained = losses(path(build, train, GroupLasso(), strengths=4))
    assert stopped.scores == pytest.approx(losses(stopped))
    assert all(a <= b + 1e-6 for a, b in zip(stopped.scores, trained))
    assert stopped.scores[0] < trained[0] - 0.01


# -- interrupted -------------------------------------------------------------------------------


def asked(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    if kind == "network":
        y = (x[:, 0] * x[:, 1] > 0).long()
        return (lambda: MLP([5, 4, 2]), (x, y), GroupLasso()), {"valid": (x, y), "strengths": 5}
    y = x[:, 0] - x[:, 2] + 0.1 * torch.randn(60, generator=generator)
    return (None, (x, y), L1()), {"strengths": 6, "folds": 3, "debias": kind == "debiased"}


def timeless(result):
    return {**result.to_dict(), "seconds": 0}


@pytest.mark.parametrize("kind", ["linear", "debiased", "network"])
def test_a_path_stopped_again_and_again_ends_as_if_it_never_was(tmp_path, kind):
    given, options = asked(kind)
    whole, stops = path(*given, **options), 0
    every = 150 if kind == "network" else 1  # steps of a sweep, or solutions
    while True:
        calls = itertools.count(1)
        try:
            result = path(
                *given, **options, output=tmp_path / "run", resume=stops > 0,
                stop=lambda calls=calls: next(calls) > every,
            )  # fmt: skip
            break
        except Stopped:
            stops += 1
    assert stops >= (2 if kind == "network" else 11)
    assert timeless(result) == timeless(whole)
    for a, b in zip(result.states, whole.states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_another_path_is_not_continued(tmp_path):
    given, options = asked("linear")
    with pytest.raises(Stopped):
        path(*given, **options, output=tmp_path, stop=lambda: True)
    for other in ({"folds": 2}, {"seed": 1}, {"strengths": 7}, {"sample_weight": [1.0] * 60}):
        with pytest.raises(InputError, match=f"different {next(iter(other))}"):
            path(*given, **options | other, output=tmp_path, resume=True)
    with pytest.raises(InputError, match="different penalty"):
        path(None, given[1], MCP(), **options, output=tmp_path, resume=True)
    with pytest.raises(InputError, match="different data"):
        path(None, (given[1][0] * 2, given[1][1]), L1(), **options, output=tmp_path, resume=True)
    with pytest.raises(InputError, match="resume needs output"):
        path(*given, **options, resume=True)


def test_a_notebook_shows_a_path_without_scores():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    found = path(None, (x, x[:, 0] + 1), L1(), strengths=4)
    html = found._repr_html_()
    assert "4 strengths" in html and "chosen" not in html
