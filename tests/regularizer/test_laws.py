"""What `regularize` promises on any optimizer: equal bit for bit, and what stays untouched."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import equal, regression, train
from tikhon.regularizer.controller import Controller

IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
LOSS = regression(dtype=torch.float32)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def decayed(model, strength):
    """Parameter groups that decay the matrices alone, as torch users write them."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": strength}, {"params": rest, "weight_decay": 0.0}]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("lr", [0.03, "tensor"])
def test_decoupled_l2_is_adamw_bit_for_bit(implementation, lr):
    ours, theirs = network(), network()
    lr = torch.tensor(0.03) if lr == "tensor" else lr
    if isinstance(lr, torch.Tensor) and implementation.get("foreach"):
        pytest.skip("torch refuses a tensor lr with foreach unless capturable")
    adam = optim.Adam(ours.parameters(), lr=lr, **implementation)
    tk.regularize(ours, adam, tk.L2(0.2), how="decoupled")
    adamw = optim.AdamW(decayed(theirs, 0.2), lr=lr, **implementation)
    assert equal(train(ours, adam, 30, LOSS), train(theirs, adamw, 30, LOSS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
@pytest.mark.parametrize("maximize", [False, True])
def test_objective_l2_is_weight_decay_bit_for_bit(kind, implementation, maximize):
    ours, theirs = network(), network()
    options = {"lr": 0.03, "maximize": maximize, **implementation}
    if implementation.get("fused") and maximize and kind is optim.SGD:
        options["lr"] = 0.003  # ascent on this loss overflows otherwise
    optimizer = kind(ours.parameters(), **options)
    tk.regularize(ours, optimizer, tk.L2(0.2))
    reference = kind(decayed(theirs, 0.2), **options)
    assert equal(train(ours, optimizer, 10, LOSS), train(theirs, reference, 10, LOSS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("how", ["objective", "decoupled"])
def test_strength_zero_is_the_plain_optimizer_bit_for_bit(kind, implementation, how):
    ours, theirs = network(), network()
    optimizer = kind(ours.parameters(), lr=0.03, weight_decay=0.0, **implementation)
    terms = {"*": [tk.L2(0.0), tk.L1(0.0)], "0.bias": tk.ElasticNet(0.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoupled L1 on Adam says what it is
        tk.regularize(ours, optimizer, terms, how=how)
    plain = kind(theirs.parameters(), lr=0.03, weight_decay=0.0, **implementation)
    assert equal(train(ours, optimizer, 10, LOSS), train(theirs, plain, 10, LOSS))


class Idle(tk.L1):
    """Must not be asked for anything."""

    def prox(self, w, step):
        raise AssertionError("work at strength 0")


class IdleAndSmooth(tk.L2):
    """The same of a gradient."""

    def grad(self, w):
        raise AssertionError("work at strength 0")


@pytest.mark.filterwarnings("ignore:.*decoupled from the metric")
@pytest.mark.parametrize("how", ["objective", "decoupled"])
@pytest.mark.parametrize("penalty", [Idle, IdleAndSmooth])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_strength_zero_costs_no_work(kind, penalty, how):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    late = tk.schedules.WarmUp(0.1, steps=2, delay=2)
    terms = {"0.weight": penalty(0.0), "2.weight": tk.Term(penalty(), strength=late)}
    tk.regularize(model, optimizer, terms, how=how)
    train(model, optimizer, 3, LOSS)
    with pytest.raises(AssertionError, match="work at strength 0"):
        train(model, optimizer, 1, LOSS)


def test_a_constraint_acts_whatever_its_strength():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    tk.regularize(model, optimizer, tk.Term(tk.MaxNorm(0.1), strength=0.0))
    train(model, optimizer, 1, LOSS)
    assert (model[0].weight.norm(dim=1) <= 0.1 + 1e-6).all()


@pytest.mark.parametrize("penalty", [tk.L2(0.3), tk.Orthogonal(0.3), tk.L1(0.3)], ids=str)
def test_grad_is_what_backward_left(penalty):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, penalty)
    LOSS(model).backward()
    tensors = [p.grad for p in model.parameters()]
    values = [g.clone() for g in tensors]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), tensors))
    assert all(torch.equal(p.grad, v) for p, v in zip(model.parameters(), values))


def test_penalty_acts_once_a_step_however_gradients_accumulate():
    results = []
    for parts in (1, 4):
        model = network()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        tk.regularize(model, optimizer, {"0.weight": tk.L2(0.5), "2.weight": tk.L1(0.1)})
        for _ in range(5):
            optimizer.zero_grad()
            for _ in range(parts):
                (LOSS(model) / parts).backward()
            optimizer.step()
        results.append(model)
    for one, four in zip(*(m.parameters() for m in results)):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


def test_penalty_comes_after_the_users_clipping():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    tk.regularize(model, optimizer, {"0.weight": tk.L2(0.5)})
    before = model[0].weight.detach().clone()
    LOSS(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-12)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * 0.5)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop])
@pytest.mark.parametrize("penalty", [tk.L2(0.2), tk.Huber(0.2), tk.L1(0.05)], ids=str)
@pytest.mark.parametrize("how", ["objective", "decoupled"])
@pytest.mark.filterwarnings("ignore:.*decoupled from the metric")
def test_closure_changes_nothing(kind, penalty, how):
    models = [network(), network()]
    for model, by_closure in zip(models, (False, True)):
        optimizer = kind(model.parameters(), lr=0.02)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0
        tk.regularize(model, optimizer, penalty, how=how)
        for _ in range(6):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = LOSS(model)
                loss.backward()
                return loss

            if by_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
    assert equal(*models)


def test_lbfgs_minimises_loss_plus_penalty():
    model = nn.Linear(6, 2, bias=False).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    y = torch.randn(40, 2, dtype=torch.float64)
    exact = {"tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = optim.LBFGS(
        model.parameters(), max_iter=100, line_search_fn="strong_wolfe", **exact
    )
    tk.regularize(model, optimizer, tk.L2(0.7))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / 2
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.step(closure)
    ridge = torch.linalg.solve(x.T @ x + 0.7 * torch.eye(6, dtype=torch.float64), x.T @ y).T
    torch.testing.assert_close(model.weight.detach(), ridge, rtol=1e-6, atol=1e-8)
    assert first > closure()


@pytest.mark.parametrize(
    "terms", [tk.L1(0.1), tk.Term(tk.L2(0.1), how="decoupled"), tk.MaxNorm(1.0)], ids=str
)
def test_lbfgs_refuses_what_its_line_search_cannot_see(terms):
    model = network()
    with pytest.raises(TypeError, match="LBFGS"):
        tk.regularize(model, optim.LBFGS(model.parameters()), terms)


def test_groups_have_their_own_lr_and_schedulers_move_it():
    model = network()
    optimizer = optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=1.0
    )
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    tk.regularize(model, optimizer, tk.L1(0.01))
    signs = [model[0].weight.detach().sign(), model[2].weight.detach().sign()]
    start = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    for layer, sign, before, lr in zip((model[0], model[2]), signs, start, (0.1, 1.0)):
        moved = (before - layer.weight.detach()) * sign
        far = before.abs() > 0.02
        torch.testing.assert_close(moved[far], torch.full_like(moved[far], 1.5 * lr * 0.01))


def test_lr_zero_moves_nothing_but_onto_the_constraint():
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    tk.regularize(model, optimizer, {"0.weight": tk.L1(0.5), "2.weight": tk.MaxNorm(0.1)})
    before = model[0].weight.detach().clone()
    train(model, optimizer, 2, LOSS)
    assert torch.equal(model[0].weight.detach(), before)
    norms = torch.linalg.vector_norm(model[2].weight, dim=1)
    assert (norms <= 0.1 * (1 + 1e-6)).all()


def test_maximize_still_shrinks():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, maximize=True)
    tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0), "2.weight": tk.L1(1e3)})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = model[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * 0.9)
    assert not model[2].weight.any()


def test_context_manager_and_remove_leave_the_plain_optimizer():
    ours, theirs = network(), network()
    optimizer = optim.Adam(ours.parameters(), lr=0.03)
    with tk.regularize(ours, optimizer, tk.L2(0.5)):
        pass
    plain = optim.Adam(theirs.parameters(), lr=0.03)
    assert equal(train(ours, optimizer, 5, LOSS), train(theirs, plain, 5, LOSS))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_prox_and_smooth_terms_add_up():
    """L1 by prox and L2 by gradient minimise the elastic net's objective."""
    results = []
    for terms in ([tk.L1(0.06), tk.L2(0.04)], tk.ElasticNet(0.1, l1_ratio=0.6)):
        model = nn.Linear(6, 2, bias=False).double()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        tk.regularize(model, optimizer, {"weight": terms})
        results.append(train(model, optimizer, 800, regression()).weight.detach())
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_two_proxes_are_refused_with_the_class_that_is_their_sum():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"GroupLasso and L1 on '0.weight'.*SparseGroupLasso"):
        tk.regularize(model, optimizer, {"*": tk.L1(0.1), "0.weight": tk.GroupLasso(0.1)})
    with pytest.raises(ValueError, match=r"L1 twice on '0.weight'"):
        tk.regularize(model, optimizer, {"*": tk.L1(0.1), "0.*": tk.L1(0.2)})
    tk.regularize(model, optimizer, {"*": tk.L1(0.1), "0.weight": tk.MaxNorm(1.0)})


def test_prox_then_constraint():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"*": [tk.L1(0.01), tk.NonNegative()]})
    train(model, optimizer, 20, LOSS)
    assert all((p >= 0).all() for p in (model[0].weight, model[2].weight))
    assert (model[0].bias < 0).any()


def test_regularizing_a_copy_leaves_the_original():
    model = network()
    twin = copy.deepcopy(model)
    optimizer = optim.SGD(twin.parameters(), lr=0.1)
    before = copy.deepcopy(model)
    tk.regularize(twin, optimizer, tk.L1(1.0))
    train(twin, optimizer, 3, LOSS)
    assert equal(model, before)


@pytest.mark.parametrize(
    "penalty", [tk.MaxNorm(0.3), tk.L2Ball(0.5), tk.GroupLasso(0.01)], ids=str
)
def test_weights_without_gradient_do_not_break_the_metric(penalty):
    """Dead inputs leave Adam's second moment at 0, hence steps of lr/eps beside steps of 1."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        x = torch.randn(64, 12, dtype=torch.float64)
        x[:, 6:] = 0
        model = nn.Linear(12, 4, bias=False).double()
        model, x = model.to(dtype), x.to(dtype)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        tk.regularize(model, optimizer, {"weight": penalty})
        loss = lambda m, x=x: (m(x) - x[:, :4]).square().mean()  # noqa: E731
        results.append(train(model, optimizer, 60, loss).weight.detach().double())
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_grad_after_closures_is_that_of_the_last_backward(set_to_none):
    model = network()
    optimizer = optim.LBFGS(model.parameters(), max_iter=4)
    tk.regularize(model, optimizer, tk.L2(0.5))
    last = []

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = LOSS(model)
        loss.backward()
        last[:] = [p.grad.clone() for p in model.parameters()]
        return loss

    optimizer.step(closure)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), last))


@dataclass(frozen=True, eq=False)
class Remembering(Controller):
    """Keeps what the weights were before each step."""

    seen: list
    start: float = 0.01
    every: int = 1
    per: str = "term"
    needs_before = True

    def next(self, strength, observation, step):
        self.seen.append(observation.readings[0].before.clone())
        return strength


def test_a_controller_of_a_prox_sees_the_weights_from_before_every_step():
    model, seen, expected = network(), [], []
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"0.weight": tk.Term(tk.L1(), strength=Remembering(seen))})
    for _ in range(3):
        expected.append(model[0].weight.detach().clone())
        train(model, optimizer, 1, LOSS)
    assert all(map(torch.equal, seen, expected)) and len(seen) == 3
