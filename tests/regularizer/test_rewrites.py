"""Loops that set weights again after `optimizer.step()` are named once; the others stay silent."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn, optim

import tikhon as tk

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).split([5, 1], dim=1)


def run(penalty, after, *, steps=14, make=optim.SGD, every=1):
    """Train, calling `after(model)` behind every step; return the warnings."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = make(model.parameters(), lr=0.05)
    tk.regularize(model, optimizer, penalty)
    act = after(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            (model(X) - Y).square().mean().backward()
            optimizer.step()
            if step % every == 0:
                act()
    return caught


def positive(model):
    return lambda: [p.data.clamp_(min=1e-3) for p in model.parameters()]


def lengthened(model):
    def act():
        for p in model.parameters():
            if p.ndim == 2:
                p.data.div_(p.data.norm(dim=1, keepdim=True)).mul_(3)

    return act


def restored(model):
    """Every norm as it was, as in loops that keep weights on a sphere."""
    norms = {name: p.detach().norm() for name, p in model.named_parameters()}

    def act():
        for name, p in model.named_parameters():
            p.data.mul_(norms[name] / p.data.norm())

    return act


def averaged(model):
    average = copy.deepcopy(model)
    for p in average.parameters():
        nn.init.normal_(p)

    @torch.no_grad()
    def act():
        for own, p in zip(average.parameters(), model.parameters()):
            p.copy_(own.lerp_(p, 0.5))

    return act


FAULTS = {
    "clipping": (tk.L1(0.5), positive, "L1 loses its zeros"),
    "renormalising": (tk.MaxNorm(1.0), lengthened, "MaxNorm loses its bound"),
    "an average copied back": (tk.L1(0.5), averaged, "L1 loses its zeros"),
    "norms kept": (tk.L2(0.1), restored, "L2 loses its decay"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loop_that_undoes_a_penalty_is_named_once_at_its_own_line(fault):
    penalty, after, message = FAULTS[fault]
    (caught,) = run(penalty, after, steps=30)
    assert message in str(caught.message) and "between the steps of SGD" in str(caught.message)
    assert caught.filename == __file__


@pytest.mark.parametrize("epoch", [3, 13])
def test_a_loop_that_does_so_once_an_epoch_is_named(epoch):
    (caught,) = run(tk.L1(0.5), averaged, steps=6 * epoch, every=epoch)
    assert "L1 loses its zeros" in str(caught.message)


def test_weights_of_another_size_are_no_loss():
    model = nn.Linear(3, 2)
    tk.regularize(model, optimizer := optim.SGD(model.parameters(), lr=0.1), tk.L1(0.1))
    for rows in (2, 4, 5):
        model.weight.data = torch.ones(rows, 3)
        model.weight.grad = torch.zeros(rows, 3)
        optimizer.step()
        assert torch.equal(model.weight.detach(), torch.full((rows, 3), 0.99))


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.Adafactor])
def test_a_plain_loop_is_silent(make):
    terms = {"0.weight": [tk.L1(0.02), tk.MaxNorm(1.0)], "2.weight": tk.L2(0.1)}
    assert not run(terms, idle, make=make)


def idle(model):
    return lambda: None


def masked(model):
    return lambda: [p.data.mul_(p.data.abs() > 0.1) for p in model.parameters()]


def clipped(model):
    return lambda: [p.data.clamp_(-0.3, 0.3) for p in model.parameters()]


def perturbed(model):
    """SAM written by hand: up, a second gradient, and back."""

    def act():
        moves = [0.05 * p.grad for p in model.parameters()]
        for sign in (1, -1):
            for p, move in zip(model.parameters(), moves):
                p.data.add_(move, alpha=sign)

    return act


def evaluated_on_average(model):
    kept = copy.deepcopy(model.state_dict())

    def act():
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
        model.load_state_dict(own)

    return act


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("after", [masked, clipped, perturbed, evaluated_on_average])
@pytest.mark.parametrize("penalty", [tk.L1(0.05), tk.MaxNorm(1.0), tk.L2(0.1)], ids=repr)
def test_what_keeps_zeros_and_bounds_is_silent(after, penalty, every):
    assert not run(penalty, after, steps=14 + 6 * every, every=every)


def test_weights_loaded_once_are_silent():
    assert not run({"*": tk.L1(0.5)}, averaged, every=10, steps=12)


def averaged_data(model):
    """As `averaged`, where autograd does not see it."""
    average = copy.deepcopy(model)
    for p in average.parameters():
        nn.init.normal_(p)

    def act():
        for own, p in zip(average.parameters(), model.parameters()):
            own.data.lerp_(p.data, 0.5)
            p.data.copy_(own.data)

    return act


def test_a_loop_that_does_so_once_an_epoch_through_data_is_named():
    (caught,) = run(tk.L1(0.5), averaged_data, steps=60, every=13)
    assert "L1 loses its zeros" in str(caught.message)


def test_a_model_that_is_converted_between_steps_is_silent():
    model = nn.Linear(5, 8)
    tk.regularize(model, optimizer := optim.SGD(model.parameters(), lr=0.1), tk.L1(0.1))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        optimizer.zero_grad()
        model(X.to(dtype)).square().mean().backward()
        optimizer.step()
