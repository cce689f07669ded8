"""Wrappers around an optimizer that change its gradients: what they spoil is refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim

import tikhon as tk


class Around:
    """A wrapper that is no optimizer, as people write them; it changes gradients before a step."""

    def __init__(self, optimizer):
        self.optim, self.options = optimizer, {"trust": 0.02, "most": 1.0}

    @property
    def param_groups(self):
        return self.optim.param_groups

    def zero_grad(self):
        self.optim.zero_grad()

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad.copy_(self.changed(p, p.grad))
        self.optim.step()


class LARC(Around):
    """You, Gitman and Ginsburg 2017: a rate for each layer by the norm of its weights."""

    def changed(self, w, grad):
        ratio = self.options["trust"] * w.norm() / (grad.norm() + 1e-8)
        return grad * (ratio / self.param_groups[0]["lr"]).clamp_max(1)


class AlongTheSphere(Around):
    """Gradients without their part along the weights."""

    def changed(self, w, grad):
        return grad - w * (w * grad).sum() / w.square().sum()


class Clipping(Around):
    def changed(self, w, grad):
        return grad * (self.options["most"] / grad.norm()).clamp_max(1)


class Decaying(Around):
    def changed(self, w, grad):
        return grad + 1e-3 * w


@pytest.mark.parametrize("kind", [LARC, AlongTheSphere])
@pytest.mark.parametrize("inner", [optim.SGD, optim.Adam, optim.Rprop])
@pytest.mark.parametrize("penalty", [tk.L1(0.1), tk.L2(0.1), tk.GroupLasso(0.1)])
def test_a_wrapper_that_changes_gradients_by_the_weights_is_no_place_for_an_objective(
    kind, inner, penalty
):
    model = nn.Linear(3, 2, bias=False)
    whole = kind(inner(model.parameters(), lr=0.1))
    state, random = model.weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"{kind.__name__} around it changes the gradients"):
        tk.regularize(model, whole, penalty)
    assert torch.equal(model.weight, state) and torch.equal(torch.get_rng_state(), random)
    assert model.weight.grad is None and not whole.optim.state
    assert not whole.optim._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", [LARC, Clipping, Decaying])
@pytest.mark.parametrize("terms", [tk.Term(tk.L2(0.1), how="decoupled"), tk.MaxNorm(0.2)])
def test_what_needs_no_gradient_is_served_within_such_wrappers(kind, terms):
    ends = []
    for regularized in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False)
        whole = kind(optim.SGD(model.parameters(), lr=0.1))
        if regularized:
            tk.regularize(model, whole, terms)
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones(2, 3)
        whole.step()
        ends.append(model.weight.detach())
    ours, plain = ends
    if isinstance(terms, tk.MaxNorm):
        assert (ours.norm(dim=1) <= 0.2 * (1 + 1e-6)).all()
    else:
        torch.testing.assert_close(ours, plain - 0.01 * before)


@pytest.mark.parametrize("kind", [Clipping, Decaying])
def test_clipping_in_a_wrapper_is_the_users_own(kind):
    model = nn.Linear(3, 2, bias=False)
    reg = tk.regularize(model, kind(optim.SGD(model.parameters(), lr=0.1)), tk.L1(0.1))
    assert reg.audit()["weight"].route == ("prox",)


@pytest.mark.parametrize("second", ["regularize", "sparsify"])
@pytest.mark.parametrize("first", [True, False])
def test_another_handle_on_the_same_steps_is_no_move_between_them(second, first):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 8, bias=False), torch.randn(32, 4)
    whole = Decaying(optim.SGD(model.parameters(), lr=0.1))

    def others():
        if second == "sparsify":
            tk.sparsify(model, whole, 0.5, steps=20, warmup=0.0)
        else:
            tk.regularize(model, whole, tk.Box(-0.1, 0.1))

    if not first:
        others()
    reg = tk.regularize(model, whole, tk.L1(1e-3))
    if first:
        others()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            whole.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            whole.step()
    assert reg.steps == 20
