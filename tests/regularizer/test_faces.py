"""The minimum on a set where the optimizer's metric is not known, against projected gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.rules import Lion

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GOAL = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GOAL[3] *= 0.2  # a row that no bound holds
GRAM = X.T @ X / len(X)
COUPLING = torch.eye(4, dtype=torch.float64) + 0.2  # rows act on each other
LENGTHS = GOAL.norm(dim=1, keepdim=True)
ON_SPHERE = torch.where(LENGTHS > 4, 4 * GOAL / LENGTHS, GOAL)
IN_SHELL = GOAL / LENGTHS * LENGTHS.clamp(3, 4)  # the last row is shorter
CLAMPED = GOAL.clamp(-1, 2)
MAKERS = {
    "Muon": lambda params: optim.Muon(params, lr=0.1, weight_decay=0.0),
    "Lion": lambda params: Lion(params, lr=0.1),
}
# a constraint, the minimum, and the pull of the loss there, outwards and along the normals
SETS = {
    "MaxNorm": (tk.MaxNorm(4.0), ON_SPHERE, torch.where(LENGTHS > 4, GOAL / LENGTHS, 0)),
    "L2Ball": (tk.L2Ball(float(GOAL.norm())), GOAL, GOAL / 5),
    "MinMaxNorm": (tk.MinMaxNorm(3.0, 4.0), IN_SHELL, (GOAL - IN_SHELL) / LENGTHS),
    "NonNegative": (tk.NonNegative(), GOAL.clamp(min=0), GOAL.clamp(max=0)),
    "Box": (tk.Box(-1.0, 2.0), CLAMPED, GOAL - CLAMPED),
}


def gradient(weight, minimum, pull):
    """Of `trace(C (W - M) S (W - M)') / 2 - <pull, W>`; convex, with its minimum on the set at M.

    That is exact by the conditions of Karush, Kuhn and Tucker, without another solver.
    """
    return COUPLING @ (weight - minimum) @ GRAM - pull


def model_at(weight):
    model = nn.Linear(6, 4, bias=False).double()
    model.weight.data.copy_(weight)
    return model


@pytest.mark.parametrize("kind", SETS)
def test_the_minimum_on_the_set_is_found(kind):
    constraint, minimum, pull = SETS[kind]
    model = model_at(1.0)
    optimizer = MAKERS["Lion"](model.parameters())
    reg = tk.regularize(model, optimizer, constraint)
    for step in range(400):
        model.weight.grad = gradient(model.weight.detach(), minimum, pull)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.97 if step > 100 else 1.0
    assert torch.allclose(model.weight.detach(), minimum, atol=0.02)  # a projection: 0.4 and 1.8
    assert reg.audit()["weight"].route == ("project",)


@pytest.mark.parametrize("kind", SETS)
def test_the_minimum_on_the_set_is_a_fixed_point_of_an_update_that_mixes_directions(kind):
    constraint, minimum, pull = SETS[kind]
    model = model_at(minimum)
    optimizer = MAKERS["Muon"](model.parameters())
    tk.regularize(model, optimizer, constraint)
    model.weight.grad = own = gradient(model.weight.detach(), minimum, pull)
    optimizer.step()
    assert torch.allclose(model.weight.detach(), minimum, atol=1e-7)
    assert model.weight.grad is own


def test_weights_on_the_bound_leave_it_where_the_gradient_points_inwards():
    model = model_at(4 / 6**0.5)
    optimizer = MAKERS["Muon"](model.parameters())
    tk.regularize(model, optimizer, tk.MaxNorm(4.0))
    model.weight.grad = model.weight.detach().clone()
    model.weight.grad[0] *= -1
    optimizer.step()
    norms = model.weight.detach().norm(dim=1)
    assert norms[0] == pytest.approx(4.0) and (norms[1:] < 3.99).all()


def test_a_single_gradient_counts_for_a_fiftieth_of_what_holds_a_row():
    model = model_at(4 / 6**0.5)  # every row on the bound
    optimizer = MAKERS["Lion"](model.parameters())
    reg = tk.regularize(model, optimizer, tk.MaxNorm(4.0))
    model.weight.grad = -3 * nn.functional.normalize(model.weight.detach(), dim=1)
    optimizer.step()
    (average,) = reg.state_dict()["averages"].values()
    assert torch.allclose(average, torch.full((4, 1), 3 / 50, dtype=torch.float64))


def test_unit_rows_turn_to_a_stationary_point():
    minimum = nn.functional.normalize(GOAL, dim=1)
    model = model_at(minimum + 0.3)
    optimizer = MAKERS["Lion"](model.parameters())
    tk.regularize(model, optimizer, tk.UnitNorm())
    for step in range(400):
        model.weight.grad = gradient(model.weight.detach(), minimum, 5 * minimum)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.97 if step > 100 else 1.0
    assert torch.allclose(model.weight.detach(), minimum, atol=1e-3)


@pytest.mark.parametrize("constraint", [tk.MaxNorm(4.0), tk.Box(-1, 1)], ids=repr)
def test_a_gradient_that_is_not_finite_stays_visible_and_leaves_no_trace(constraint):
    model = model_at(9.0)
    optimizer = MAKERS["Lion"](model.parameters())
    reg = tk.regularize(model, optimizer, constraint)
    for _ in range(2):
        model.weight.grad = -torch.ones_like(GOAL)
        optimizer.step()
    kept = reg.state_dict()["averages"]
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
    model.weight.grad = -torch.ones_like(GOAL)
    model.weight.grad[1, 2] = torch.nan
    optimizer.step()
    assert seen[0][1].isnan().any() and seen[0][[0, 2, 3]].isfinite().all()
    after = reg.state_dict()["averages"]
    assert all(after[name].isfinite().all() for name in kept)


def test_what_holds_weights_is_restored_after_an_error():
    model = model_at(9.0)
    optimizer = MAKERS["Lion"](model.parameters())
    reg = tk.regularize(model, optimizer, tk.MaxNorm(4.0))
    for _ in range(3):
        model.weight.grad = -torch.ones_like(GOAL)
        optimizer.step()
    (before,) = reg.state_dict()["averages"].values()
    assert (before > 0).all()
    optimizer.direction = lambda state, grad: 1 / 0
    own = model.weight.grad
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert model.weight.grad is own
    (after,) = reg.state_dict()["averages"].values()
    assert torch.equal(before, after)
