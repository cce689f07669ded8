"""Decay as people ask for it: independent of lr, and only where the optimizer agrees."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import equal, regression, train
from regularizer.rules import MUON, Lion

LOSS = regression()


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 2, bias=False).double()


def quiet(model, optimizer, steps=1):
    for _ in range(steps):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW, Lion, *MUON, optim.Adafactor])
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_independent_decay_does_not_depend_on_lr(make, lr):
    model = linear()
    options = {} if make in (optim.SGD, Lion) else {"weight_decay": 0.0}
    optimizer = make(model.parameters(), lr=lr, **options)
    before = model.weight.detach().clone()
    tk.regularize(model, optimizer, tk.L2(0.01), how="independent")
    torch.testing.assert_close(quiet(model, optimizer, 10), before * 0.99**10)


def test_independent_decay_follows_a_scheduler_as_in_the_paper_of_adamw():
    model, factors = linear(), (0.5, 1.0, 0.25)
    optimizer = optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.0)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: (*factors, 0.0)[step])
    tk.regularize(model, optimizer, tk.L2(0.1), how="independent")
    expected = model.weight.detach().clone()
    for factor in factors:
        expected = expected * (1 - 0.1 * factor)
        torch.testing.assert_close(quiet(model, optimizer), expected)
        scheduler.step()


def test_one_cycle_counts_from_its_peak():
    model = linear()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    tk.regularize(model, optimizer, tk.L2(0.1), how="independent")
    for _ in range(9):
        before, share = model.weight.detach().clone(), optimizer.param_groups[0]["lr"] / 0.5
        torch.testing.assert_close(quiet(model, optimizer), before * (1 - 0.1 * share))
        scheduler.step()


def test_an_independent_threshold_is_the_strength():
    model = linear()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    before = model.weight.detach().clone()
    tk.regularize(model, optimizer, tk.L1(0.05), how="independent")
    torch.testing.assert_close(quiet(model, optimizer), tk.L1(0.05).prox(before, 1.0))


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, Lion])
def test_cautious_decay_acts_where_the_move_agrees(make):
    ours, plain = linear(), linear()
    optimizer, alone = make(ours.parameters(), lr=0.02), make(plain.parameters(), lr=0.02)
    reg = tk.regularize(ours, optimizer, tk.L2(0.5), how="cautious")
    assert reg.audit()["weight"].how == reg.audit()["weight"].route == ("cautious",)
    for _ in range(20):
        start = ours.weight.detach().clone()
        gradient = torch.randn_like(start)
        for model, one in ((ours, optimizer), (plain, alone)):
            with torch.no_grad():
                model.weight.copy_(start)
            model.weight.grad = gradient.clone()
            one.step()
        moved = plain.weight.detach()
        agrees = (start - moved) * start >= 0
        expected = torch.where(agrees, moved - 0.02 * 0.5 * start, moved)
        torch.testing.assert_close(ours.weight.detach(), expected)
        assert agrees.any() and not agrees.all()


def test_cautious_decay_towards_a_center_goes_by_the_way_there():
    model, center = linear(), torch.ones(2, 6).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L2(1.0, center=center), how="cautious")
    start = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(start)  # away from the center, which is above
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), start - 0.1)


def test_cautious_decay_with_a_closure_and_strength_0():
    results = []
    for strength, by_closure in ((0.5, True), (0.5, False), (0.0, False), (None, False)):
        model = linear()
        optimizer = optim.Adam(model.parameters(), lr=0.02)
        if strength is not None:
            tk.regularize(model, optimizer, tk.L2(strength), how="cautious")
        if not by_closure:
            results.append(train(model, optimizer, 6, LOSS))
            continue
        for _ in range(6):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                value = LOSS(model)
                value.backward()
                return value

            optimizer.step(closure)
        results.append(model)
    assert equal(*results[:2]) and equal(*results[2:]) and not equal(*results[1:3])


def test_what_decay_cannot_be_is_refused_by_name():
    model = linear()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"weight/L1 acts by its prox.*smooth penalty, such as L2"):
        tk.regularize(model, optimizer, tk.L1(0.1), how="cautious")
    with pytest.raises(TypeError, match=r"NormBound of weight/L2.*not how='cautious'"):
        tk.regularize(model, optimizer, tk.L2(tk.NormBound(0.1)), how="cautious")
    with pytest.raises(ValueError, match=r"'cautios'.*cautious"):
        tk.regularize(model, optimizer, tk.L2(0.1), how="cautios")
    with pytest.raises(TypeError, match=r"line search of LBFGS"):
        tk.regularize(model, optim.LBFGS(model.parameters()), tk.L2(0.1), how="cautious")


@pytest.mark.parametrize("how", ["objective", "decoupled", "independent", "cautious"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("penalty", [tk.L2(0.5), tk.Huber(0.5, delta=0.2), tk.GroupLasso(0.3)])
def test_parameters_of_one_row_move_by_their_own_rates(penalty, how, dtype):
    """Two layers that share the rows of their inputs, in groups of their own."""
    if how == "cautious" and not penalty.smooth:
        return
    torch.manual_seed(0)
    rates = {"a": 0.25, "b": 0.03125}
    model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in rates}).to(dtype)
    optimizer = optim.SGD(
        [{"params": model[k].parameters(), "lr": lr, "initial_lr": 1.0} for k, lr in rates.items()]
    )
    term = tk.Term(penalty, rows="feature", how=how)
    tk.regularize(model, optimizer, {("a.weight", "b.weight"): term})
    before = torch.cat([model[name].weight for name in rates]).detach().double().T
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    after = torch.cat([model[name].weight for name in rates]).detach().double().T
    lr = torch.tensor([0.25, 0.25, 0.03125, 0.03125], dtype=torch.float64)
    if penalty.smooth:
        pull = penalty.grad(before)
    else:  # the condition of a prox: the way over the step is the gradient at its end
        assert (after.norm(dim=1) > 0).all()
        pull = 0.3 * after / after.norm(dim=1, keepdim=True)
    close = {} if dtype == torch.float64 else {"atol": 4e-3, "rtol": 0}
    torch.testing.assert_close(after, before - lr * pull, **close)


@pytest.mark.parametrize("rows", [None, "feature"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_independent_decay_follows_a_rate_that_is_set_by_hand(rows, as_tensor):
    model = linear()
    lr = torch.tensor(0.04) if as_tensor else 0.04
    optimizer = optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=False)
    term = tk.Term(tk.L2(0.1), how="independent", rows=rows)
    reg = tk.regularize(model, optimizer, {"weight": term})
    expected = model.weight.detach().clone()
    for factor in (0.25, 1.0, 0.5):
        optimizer.param_groups[0]["lr"] = lr * factor
        expected = expected * (1 - 0.1 * factor)
        torch.testing.assert_close(quiet(model, optimizer), expected, rtol=1e-6, atol=0)
    assert reg.audit()["weight"].note == "decay time 20 steps" or rows
    state = reg.state_dict()
    reg.remove()
    reg = tk.regularize(model, optimizer, {"weight": term})  # which begins in the middle
    reg.load_state_dict(state)
    torch.testing.assert_close(quiet(model, optimizer), expected * 0.95, rtol=1e-6, atol=0)


def test_independent_decay_of_a_warm_up_from_nothing_counts_from_its_peak():
    model = linear()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    tk.regularize(model, optimizer, tk.L2(0.1), how="independent")
    expected = model.weight.detach().clone()
    for lr, share in ((0.1, 1), (0.2, 1), (0.05, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        expected = expected * (1 - 0.1 * share)
        torch.testing.assert_close(quiet(model, optimizer), expected)


def test_reduce_on_plateau_is_followed():
    model = linear()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    tk.regularize(model, optimizer, tk.L2(0.1), how="independent")
    for _ in range(2):
        scheduler.step(1.0)
    before = model.weight.detach().clone()
    torch.testing.assert_close(quiet(model, optimizer), before * 0.95)


class FindsItsRate(optim.Optimizer):
    """Gradient descent by `lr * d`, with a `d` of its own, as Prodigy has it."""

    def __init__(self, params, d):
        super().__init__(params, {"lr": 1.0, "d": d, "d0": 1e-6, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rate = group["lr"] * group["d"]
            for p in group["params"]:
                p.mul_(1 - rate * group["weight_decay"]).sub_(p.grad, alpha=rate)


def test_decoupled_decay_goes_by_the_rate_that_an_optimizer_finds():
    ours, theirs = linear(), linear()
    tk.regularize(ours, a := FindsItsRate(ours.parameters(), 0.02), tk.L2(0.5), how="decoupled")
    b = FindsItsRate(theirs.parameters(), 0.02)
    b.param_groups[0]["weight_decay"] = 0.5
    for model, optimizer in ((ours, a), (theirs, b)):
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
