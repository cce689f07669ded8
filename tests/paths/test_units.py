"""The answer has the units of the data: scaling inputs, targets or row weights scales it."""

from __future__ import annotations

from functools import cache
from itertools import cycle

import pandas as pd
import pytest
import torch
from torch import nn

from tikhon.paths.path import path
from tikhon.paths.stability import stability
from tikhon.penalties import L1, MCP, SLOPE, ElasticNet, GroupLasso, Hierarchical

SCALES = [1e-7, 1e7]


def data(kind="squared"):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    y = x[:, :3] @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    y = y + 0.7 * torch.randn(60, generator=generator, dtype=torch.float64)
    if kind == "logistic":
        return x, (y > 0).long()
    return x, y


HOMOGENEOUS = [L1(), GroupLasso(), SLOPE()]  # a penalty whose strength alone has a unit


@cache
def in_its_unit(penalty, kind, **options):
    return path(None, data(kind), penalty, folds=3, strengths=6, **options)


# each penalty in a small or in a large unit
@pytest.mark.parametrize(
    ("penalty", "scale"), list(zip(HOMOGENEOUS, cycle(SCALES))), ids=lambda v: type(v).__name__
)
def test_targets_in_another_unit(penalty, scale):
    x, y = data()
    for debias in (False, True):
        plain = in_its_unit(penalty, "squared", debias=debias)
        found = path(None, (x, y * scale), penalty, folds=3, strengths=6, debias=debias)
        assert found.chosen == plain.chosen and found.counts == plain.counts
        assert torch.equal(found.supports, plain.supports)
        assert found.strengths == pytest.approx([s * scale for s in plain.strengths])
        assert found.scores == pytest.approx([s * scale**2 for s in plain.scores], rel=1e-3)
        assert torch.allclose(found.coefficients, plain.coefficients * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("penalty", "scale", "kind"),
    [
        (penalty, scale, kind)
        for k, penalty in enumerate(HOMOGENEOUS)
        for scale, kind in zip(SCALES[:: (-1) ** k], ("squared", "logistic"))
    ],
    ids=lambda v: type(v).__name__,
)
def test_inputs_in_another_unit(penalty, scale, kind):
    x, y = data(kind)
    plain = in_its_unit(penalty, kind, smallest=0.05)
    found = path(None, (x * scale, y), penalty, folds=3, strengths=6, smallest=0.05)
    assert found.counts == plain.counts and found.chosen == plain.chosen
    assert found.strengths == pytest.approx([s * scale for s in plain.strengths])
    assert found.scores == pytest.approx(plain.scores, rel=1e-3)
    assert torch.allclose(found.coefficients * scale, plain.coefficients, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["squared", "logistic"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_inputs_in_a_unit_beyond_float32(scale, kind):
    x, y = data(kind)
    plain = path(None, (x, y), L1(), folds=3, strengths=4, smallest=0.1)
    found = path(None, (x * scale, y), L1(), folds=3, strengths=4, smallest=0.1)
    assert found.chosen == plain.chosen
    assert torch.allclose(found.coefficients * scale, plain.coefficients, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("make", [ElasticNet, MCP], ids=lambda p: p.__name__)
@pytest.mark.parametrize("scale", SCALES)
def test_a_penalty_of_two_units_scales_where_both_are_scaled(make, scale):
    """Targets and inputs times c leave the weights; the strength of both parts grows by c^2."""
    x, y = data()
    plain = path(None, (x, y), make(), strengths=8)
    factor = dict(gamma=3.0 / scale**2) if make is MCP else {}
    found = path(None, (x * scale, y * scale), make(**factor), strengths=8)
    assert found.counts == plain.counts
    assert torch.allclose(found.coefficients, plain.coefficients, rtol=1e-5, atol=1e-9)


def test_each_column_in_a_unit_of_its_own():
    """A weight in the unit of its column, with the factor that takes its penalty there."""
    x, y = data()
    units = torch.logspace(-6, 6, 12, dtype=torch.float64)
    plain = path(None, (x, y), L1(), folds=3, strengths=6)
    found = path(None, (x * units, y), L1(weights=units), folds=3, strengths=6)
    assert found.counts == plain.counts and found.chosen == plain.chosen
    assert torch.allclose(found.coefficients * units, plain.coefficients, rtol=1e-6, atol=1e-9)


FORMS = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "frames": lambda x, y: (pd.DataFrame(x.numpy()), pd.Series(y.numpy())),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_offset_of_inputs_and_targets_moves_the_intercept_alone(form):
    x, y = data()
    plain = path(None, form(x, y), L1(), folds=3, strengths=6)
    found = path(None, form(x + 1e6, y - 1e7), L1(), folds=3, strengths=6)
    assert found.counts == plain.counts and found.chosen == plain.chosen
    assert torch.allclose(found.coefficients, plain.coefficients, rtol=1e-5, atol=1e-7)
    predicted = [
        a @ r.coefficients[-1, 0] + r.intercepts[-1] for r, a in ((plain, x), (found, x + 1e6))
    ]
    assert torch.allclose(predicted[1] + 1e7, predicted[0], atol=1e-5)


def test_a_networks_targets_have_no_unit_and_no_offset():
    x, y = data()
    x, y = x[:, :6], torch.stack([y, x[:, 0] * x[:, 4]], 1)
    build = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
    plain = path(build, (x, y), Hierarchical(), valid=(x, y), strengths=4)
    far = 1e4 * y + 1e6
    found = path(build, (x, far), Hierarchical(), valid=(x, far), strengths=4)
    assert found.counts == plain.counts and found.counts[-1] == 0
    assert [s / 1e8 for s in found.strengths] == pytest.approx(plain.strengths, rel=1e-3)
    assert [s / 1e8 for s in found.scores] == pytest.approx(plain.scores, rel=1e-2)
    for k, score in enumerate(found.scores):  # the networks answer in the targets' own unit
        error = (found.model(k)(x.float()) - far).square().sum(1).mean() / 2
        assert error.item() == pytest.approx(score, rel=1e-2)


def test_a_network_that_keeps_its_features_is_told_of():
    x, y = data()
    build = lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))  # noqa: E731
    with pytest.warns(UserWarning, match="GroupLasso ended with 12 of 12 features on") as caught:
        path(build, (x * 1e3, y[:, None]), GroupLasso(), strengths=2)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("scale", SCALES)
def test_row_weights_have_no_unit(scale):
    x, y = data()
    weights = torch.rand(60, generator=torch.Generator().manual_seed(0)).double()
    plain = path(None, (x, y), L1(), folds=3, strengths=6, sample_weight=weights)
    found = path(None, (x, y), L1(), folds=3, strengths=6, sample_weight=weights * scale)
    assert found.strengths == pytest.approx(plain.strengths)
    assert found.scores == pytest.approx(plain.scores)


@pytest.mark.parametrize("scale", SCALES)
def test_choices_without_validation_rows_have_no_unit(scale):
    x, y = data()
    plain = path(None, (x, y), L1(), strengths="universal")
    found = path(None, (x / scale, y * scale), L1(), strengths="universal")
    assert found.counts == plain.counts
    assert found.strengths == pytest.approx(plain.strengths, rel=1e-3)
    picked = [stability((x, v), draws=4, strengths=4).frequencies for v in (y, y * scale)]
    assert torch.equal(*picked)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, -3.0])
def test_constant_targets_are_named_and_constant_columns_stay_out(value):
    x, y = data()
    with pytest.raises(ValueError, match="do not depend on any feature"):
        path(None, (x, torch.full_like(y, value)), L1())
    x[:, 0] = value
    found = path(None, (x, y), L1(), strengths=10)
    assert not found.supports[:, 0].any()
    assert found.coefficients.isfinite().all() and max(found.residuals) < 1e-8
    assert path(None, (x, torch.full_like(y, value)), L1(), strengths=[1.0]).counts == [0]
