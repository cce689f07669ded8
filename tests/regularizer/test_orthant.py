"""Exact zeros where the optimizer's metric is not known: the minimum, the zeros, the refusals."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso
from torch import nn, optim

import tikhon as tk
from regularizer.rules import MUON, WITHOUT_GAIN, Heavy, Lion, OwnAdam, Sign

ROWS, COLUMNS, OUTPUTS, STRENGTH = 60, 8, 3, 0.15


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    truth = torch.zeros(OUTPUTS, COLUMNS, dtype=torch.float64)
    truth[:, :3] = torch.tensor([[1.0, -2.0, 0.5], [0.8, 0.4, -1.0], [-0.7, 1.1, 0.9]])
    noise = 0.3 * torch.randn(ROWS, OUTPUTS, generator=generator, dtype=torch.float64)
    return x, x @ truth.T + noise


X, Y = data()
SOLVERS = {
    "L1": (tk.Term(tk.L1(STRENGTH)), Lasso(STRENGTH, fit_intercept=False, tol=1e-12)),
    "ElasticNet": (
        tk.Term(tk.ElasticNet(STRENGTH, l1_ratio=0.7)),
        ElasticNet(STRENGTH, l1_ratio=0.7, fit_intercept=False, tol=1e-12),
    ),
    "GroupLasso": (
        tk.Term(tk.GroupLasso(STRENGTH), rows="in"),
        MultiTaskLasso(STRENGTH, fit_intercept=False, tol=1e-12),
    ),
}


def loss(weight):
    return (X @ weight.T - Y).square().sum() / (2 * ROWS)


def objective(weight, term):
    seen = weight.T if term.rows == "in" else weight
    return float(loss(weight) + term.penalty.value(seen))


def linear():
    torch.manual_seed(1)
    return nn.Linear(COLUMNS, OUTPUTS, bias=False).double()


def gradient(weight):
    return (weight.detach() @ X.T - Y.T) @ X / ROWS


def train(model, optimizer, steps):
    """Full batches; the learning rate falls in the second half, as every sign update needs."""
    for step in range(steps):
        model.weight.grad = gradient(model.weight)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 1e-7 ** (2 / steps) if step >= steps // 2 else 1.0
    return model.weight.detach()


# every optimizer, and every penalty with three of them
@pytest.mark.parametrize(("name", "kind"), list(zip(WITHOUT_GAIN, cycle(SOLVERS))))
def test_the_minimum_is_that_of_scikit_learn(name, kind):
    term, solver = SOLVERS[kind]
    make, options = WITHOUT_GAIN[name]
    model = linear()
    optimizer = make(model.parameters(), **options)
    reg = tk.regularize(model, optimizer, {"weight": term})
    assert reg.audit()["weight"].route == ("orthant",)
    weight = train(model, optimizer, 1000 if name == "Lion" else 450)  # its memory is long
    best = torch.from_numpy(solver.fit(X.numpy(), Y.numpy()).coef_)
    gap = objective(weight, term) / objective(best, term) - 1
    assert gap <= 1e-6
    assert torch.equal(weight != 0, best != 0)
    assert 0 < int((best == 0).sum()) < best.numel()


NON_CONVEX = [
    tk.SparseGroupLasso(STRENGTH, l1_ratio=0.4),
    tk.MCP(STRENGTH),
    tk.SCAD(STRENGTH),
    tk.LogSum(0.03),
    tk.GroupMCP(STRENGTH),
    tk.L1(STRENGTH, weights=torch.linspace(0, 2, OUTPUTS * COLUMNS).double().reshape(3, 8)),
    tk.GroupLasso(STRENGTH, weights=torch.linspace(0, 2, COLUMNS).double()),
    tk.SparseGroupLasso(STRENGTH, weights=torch.linspace(0.5, 2, COLUMNS).double()),
]


# both without a gain take one route: every penalty with one of the two
@pytest.mark.parametrize(
    ("name", "penalty"),
    list(zip(cycle(["Muon", "Sign"]), NON_CONVEX)),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_where_it_rests_is_a_stationary_point_with_zeros(name, penalty):
    make, options = WITHOUT_GAIN[name]
    model = linear()
    optimizer = make(model.parameters(), **options)
    term = tk.Term(penalty, rows="tensor" if penalty.elementwise else "in")
    tk.regularize(model, optimizer, {"weight": term})
    weight = train(model, optimizer, 450)
    slope = gradient(weight)
    if term.rows == "in":
        weight, slope = weight.T, slope.T
    assert tk.penalties.residual(penalty, weight, slope, 0.1) < 1e-5
    assert (weight == 0).any() and (weight != 0).any()


def step_with(model, optimizer, *gradients):
    for gradient in gradients:
        model.weight.grad = torch.as_tensor(gradient).expand_as(model.weight).clone()
        optimizer.step()
    return model.weight.detach()


def test_the_state_of_the_optimizer_does_not_push_a_zero_out():
    model = linear()
    optimizer = Heavy(model.parameters(), lr=0.1)
    step_with(model, optimizer, *[-torch.ones(1).double()] * 20)  # speed that lasts
    nn.init.zeros_(model.weight)
    tk.regularize(model, optimizer, {"weight": tk.L1(1.0)})
    assert not step_with(model, optimizer, *[torch.full((1,), -0.5).double()] * 5).any()


def test_a_zero_is_left_where_the_gradient_is_steeper_than_the_penalty():
    model = linear()
    nn.init.zeros_(model.weight)
    optimizer = Sign(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"weight": tk.L1(1.0)})
    slopes = torch.tensor([-1.1, -0.9, 0.0, 0.9, 1.1, 0.5, -3.0, 2.0]).double()
    weight = step_with(model, optimizer, slopes)
    expected = torch.tensor([0.1, 0, 0, 0, -0.1, 0, 0.1, -0.1]).double()
    torch.testing.assert_close(weight, expected.expand_as(weight))


def test_the_noise_of_batches_does_not_release_zeros():
    model = linear()
    nn.init.zeros_(model.weight)
    optimizer = Sign(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"weight": tk.L1(1.0)})
    noisy = [torch.full((1,), 0.5 + 2.0 * (-1) ** step).double() for step in range(1, 40)]
    step_with(model, optimizer, torch.zeros(1).double())
    assert not step_with(model, optimizer, *noisy).any()


def test_a_weight_that_would_cross_zero_stops_there():
    model = linear()
    nn.init.constant_(model.weight, 0.05)
    optimizer = Sign(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"weight": tk.L1(1.0)})
    assert not step_with(model, optimizer, torch.zeros(1).double()).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("term", [tk.L1(0.1), tk.GroupLasso(0.1), tk.SparseGroupLasso(0.1)])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_what_is_not_finite_stays_visible(term, bad, start):
    model = linear()
    nn.init.constant_(model.weight, start)
    optimizer = Heavy(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"weight": term})
    one = torch.zeros(OUTPUTS, COLUMNS).double()
    one[1, 2] = bad
    for slope in (one, torch.zeros_like(one)):
        assert not step_with(model, optimizer, slope)[1, 2].isfinite()


def runs(make, steps=6):
    model = linear()
    optimizer = make(model.parameters(), lr=0.02)
    reg = tk.regularize(model, optimizer, {"weight": tk.L1(STRENGTH)})
    return model, optimizer, reg


@pytest.mark.parametrize("make", [Lion, Heavy, *MUON, optim.Rprop])
def test_a_closure_changes_nothing(make):
    results = []
    for by_closure in (False, True):
        model, optimizer, _ = runs(make)
        for _ in range(6):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                value = loss(model.weight)
                value.backward()
                return value

            if by_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
        results.append(model.weight)
    assert torch.equal(*results)


def test_a_resumed_run_goes_on_bit_for_bit():
    torch.manual_seed(3)
    noise = [gradient(linear().weight) + torch.randn(OUTPUTS, COLUMNS).double() for _ in range(60)]
    model, optimizer, reg = runs(Lion)
    step_with(model, optimizer, *noise[:30])
    twin, other, again = runs(Lion)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(reg.state_dict())
    reference = step_with(model, optimizer, *noise[30:])
    assert torch.equal(step_with(twin, other, *noise[30:]), reference)
    assert (reference == 0).any()


def test_gradients_are_given_back():
    model, optimizer, _ = runs(Lion)
    left = gradient(model.weight)
    model.weight.grad = left
    optimizer.step()
    assert model.weight.grad is left and torch.equal(left, gradient(linear().weight))


def test_maximize_still_shrinks():
    results = []
    for sign in (1, -1):
        model = linear()
        options = {"lr": 0.05, "weight_decay": 0.0, "maximize": sign < 0}
        optimizer = optim.Adafactor(model.parameters(), **options)
        tk.regularize(model, optimizer, {"weight": tk.L1(STRENGTH)})
        for _ in range(30):
            weight = step_with(model, optimizer, sign * gradient(model.weight))
        results.append(weight)
    assert torch.equal(*results) and (results[0] == 0).any()


def test_it_comes_after_smooth_terms_and_before_constraints():
    results = []
    for terms in ([tk.L1(0.7 * STRENGTH), tk.L2(0.3 * STRENGTH)], SOLVERS["ElasticNet"][0]):
        model = linear()
        optimizer = Sign(model.parameters(), lr=0.01)
        tk.regularize(model, optimizer, {"weight": terms})
        results.append(train(model, optimizer, 450))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    model = linear()
    optimizer = Sign(model.parameters(), lr=0.01)
    tk.regularize(model, optimizer, {"weight": [tk.L1(0.01), tk.NonNegative()]})
    weight = train(model, optimizer, 50)
    assert (weight >= 0).all() and (weight == 0).any()


def test_weights_in_bfloat16_reach_zero():
    model = linear().bfloat16()
    optimizer = Sign(model.parameters(), lr=0.01)
    tk.regularize(model, optimizer, {"weight": tk.L1(1.0)})
    assert not step_with(model, optimizer, *[torch.zeros(1).bfloat16()] * 60).any()


def test_a_class_with_a_step_of_its_own_inherits_no_gain():
    class Named(optim.SGD):
        """Changes nothing."""

    for make, route in ((Named, "prox"), (OwnAdam, "orthant")):
        model = linear()
        optimizer = make(model.parameters(), lr=0.1)
        reg = tk.regularize(model, optimizer, {"weight": tk.L1(0.1)})
        assert reg.audit()["weight"].route == (route,)
        assert f"objective, {route}" in str(reg.audit())


REFUSED = [
    tk.NuclearNorm(0.1),
    tk.SpectralNorm(0.1),
    tk.SLOPE(0.1),
    tk.TotalVariation(0.1),
    tk.LInf(0.1),
]


@pytest.mark.parametrize("penalty", REFUSED, ids=lambda p: type(p).__name__)
def test_what_needs_the_gain_is_refused_by_name(penalty):
    model = linear()
    name = type(penalty).__name__
    with pytest.raises(
        TypeError, match=rf"{name} holds zeros.*Sign has no.*register_gain.*decoup"
    ):
        tk.regularize(model, Sign(model.parameters()), {"weight": penalty})


def test_controllers_that_read_the_gain_are_refused_by_name():
    model = linear()
    strength = tk.TargetSparsity(0.5, steps=10)
    with pytest.raises(
        TypeError, match=r"TargetSparsity of weight/L1.*Sign has no.*register_gain"
    ):
        tk.regularize(model, Sign(model.parameters()), tk.Term(tk.L1(), strength=strength))


CONSTRAINTS = [
    tk.MaxNorm(0.8),
    tk.UnitNorm(),
    tk.MinMaxNorm(0.4, 0.8),
    tk.L1Ball(2.0),
    tk.L2Ball(1.0),
    tk.SpectralBall(1.0),
    tk.NonNegative(),
    tk.Box(-0.2, 0.2),
    tk.Simplex(),
    tk.TopK(5),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", [*WITHOUT_GAIN, "Adam"])
def test_constraints_hold_after_every_step(name, constraint):
    make, options = WITHOUT_GAIN.get(name, (optim.Adam, {"lr": 0.1}))
    model = linear()
    optimizer = make(model.parameters(), **options)
    reg = tk.regularize(model, optimizer, {"weight": constraint})
    for _ in range(5):
        step_with(model, optimizer, 10 * gradient(model.weight))
        (target,) = tk.select(model, "weight", rows=constraint.rows)
        assert constraint.value(target.read()) == 0
    plain = name == "Adam" and not isinstance(constraint, tk.SpectralBall | tk.TopK)
    along = isinstance(constraint, tk.MaxNorm | tk.MinMaxNorm | tk.L2Ball | tk.UnitNorm)
    flat = not (constraint.elementwise or plain or (along and name != "Adam"))
    assert reg.audit()["weight"].route == ("project, Euclidean" if flat else "project",)
    assert ("not at the minimum on it" in reg.audit()["weight"].note) == flat


@pytest.mark.parametrize(
    ("make", "options"),
    [(optim.Adafactor, {"lr": 0.02, "weight_decay": 0.0}), (optim.Rprop, {}), (Lion, {})],
)
def test_rows_close_to_zero_find_their_way_out_and_tiny_ones_in(make, options):
    """Steps as long as the row itself turn it again and again, and seldom meet zero."""
    torch.manual_seed(0)
    lengths = torch.tensor([[2.0], [1.03], [0.9], [1.01]], dtype=torch.float64)
    goal = nn.functional.normalize(torch.randn(4, 10, dtype=torch.float64), dim=1) * lengths
    model = nn.Linear(10, 4, bias=False).double()
    optimizer = make(model.parameters(), **{"lr": 0.01} | options)
    tk.regularize(model, optimizer, tk.GroupLasso(1.0))
    for step in range(1500):
        model.weight.grad = model.weight.detach() - goal
        optimizer.step()
        if step >= 750:
            optimizer.param_groups[0]["lr"] *= 0.985
    exact = tk.GroupLasso(1.0).prox(goal, 1.0)
    torch.testing.assert_close(model.weight.detach(), exact, atol=1e-3, rtol=0)
    assert torch.equal(model.weight == 0, exact == 0)
