"""At a KKT point with a constant gradient and a steady state, one step leaves the weights."""

from __future__ import annotations

import pytest
import torch

import tikhon as tk
from regularizer.problems import PENALTIES, UNIFORM, WITH_GAIN, linear
from tikhon.penalties import Proximable


def describe(penalty):
    fields = [k for k, v in vars(penalty).items() if isinstance(v, torch.Tensor)]
    return type(penalty).__name__ + ("-" + fields[0] if fields else "")


def kkt_point(penalty, shape):
    """Weights w and a gradient g with 0 in g + subdifferential of the penalty at w."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    view = z.reshape(1, -1) if penalty.rows == "tensor" and not penalty.elementwise else z
    if not isinstance(penalty, Proximable):
        return z, -penalty.grad(view).reshape(shape)
    w = penalty.prox(view, 1.0).reshape(shape)
    return w, w - z


def step_from(name, penalty, how="objective", last_rate=1.0):
    """The weights before and after one more step, once the optimizer's state is steady."""
    kind, options, steps = WITH_GAIN[name]
    if name == "RAdam":
        options = {"lr": 0.5}  # its rectification shortens the first steps to a 25th
    model = linear()
    optimizer = kind(model.parameters(), **options)
    tk.regularize(model, optimizer, {"weight": penalty}, how=how)
    w, g = kkt_point(penalty, model.weight.shape)
    for count in range(steps + 1):
        with torch.no_grad():
            model.weight.copy_(w)
        model.weight.grad = g.clone()
        optimizer.param_groups[0]["lr"] *= last_rate if count == steps else 1
        optimizer.step()
    return w, model.weight.detach()


# gains are one number with SGD and one for each weight with Adam; the others meet a third each
CELLS = [
    pytest.param(name, penalty, id=f"{name}-{describe(penalty)}")
    for first, name in enumerate(WITH_GAIN)
    for index, penalty in enumerate(PENALTIES)
    if name in ("SGD", "Adam") or (first + index) % 3 == 0
]


@pytest.mark.parametrize(("name", "penalty"), CELLS)
def test_one_step_leaves_a_stationary_point(name, penalty):
    exact = name in UNIFORM or penalty.diagonal or penalty.smooth
    if not exact and penalty.constraint:  # projected in the Euclidean metric: it holds, no more
        _, after = step_from(name, penalty)
        assert penalty.value(after) == 0
        return
    if not exact:
        with pytest.raises(TypeError, match=r'no exact prox in the metric of .*how="decoupled"'):
            step_from(name, penalty)
        return
    before, after = step_from(name, penalty)
    torch.testing.assert_close(after, before, rtol=1e-7, atol=3e-7)


@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.GroupLasso(0.5)], ids=describe)
@pytest.mark.parametrize("name", WITH_GAIN)
def test_so_does_a_step_whose_rate_has_changed(name, penalty):
    before, after = step_from(name, penalty, last_rate=0.3)
    torch.testing.assert_close(after, before, rtol=1e-7, atol=3e-7)


@pytest.mark.filterwarnings("ignore:.*decoupled from the metric")
def test_the_law_notices_a_wrong_gain():
    """The law is not empty: with lr in the place of the gain it fails."""
    for name in ("SGD momentum", "Adam", "RMSprop momentum"):
        before, after = step_from(name, tk.L1(0.3), how="decoupled")
        assert (before - after).abs().max() > 1e-4
