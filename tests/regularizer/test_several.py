"""Several optimizers on one model: one handle for all, or one handle beside others."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import equal


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def two(model):
    first = optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    return first, optim.AdamW(model[2].parameters(), lr=0.02, weight_decay=0.0)


def train(model, optimizers, steps, every=(1, 1)):
    data = torch.Generator().manual_seed(0)
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(8, 4, generator=data)).square().mean().backward()
        for optimizer, period in zip(optimizers, every):
            if step % period == 0:
                optimizer.step()


TERMS = {
    "numbers": tk.L1(0.05),
    "schedule": tk.L1(tk.schedules.Linear(0.0, 0.1, 6)),
    "controller": tk.Term(tk.L1(), strength=tk.TargetSparsity(0.5, steps=6)),
    "decoupled": tk.Term(tk.L2(tk.schedules.Linear(0.0, 0.5, 6)), how="decoupled"),
}


@pytest.mark.parametrize("every", [(1, 1), (1, 3)])
@pytest.mark.parametrize("term", TERMS)
def test_one_handle_is_two_handles(term, every):
    """A list of optimizers does what a Regularizer on each would do to its own parameters."""
    one, other = network(), network()
    optimizers = two(one)
    reg = tk.regularize(one, optimizers, TERMS[term])
    train(one, optimizers, 12, every)
    pair = two(other)
    handles = [
        tk.regularize(other, optimizer, {name: TERMS[term]})
        for optimizer, name in zip(pair, ("0.weight", "2.weight"))
    ]
    train(other, pair, 12, every)
    assert equal(one, other)
    assert [handle.steps for handle in handles] == reg.state_dict()["steps_of_each"]
    expected = {**handles[0].strengths(), **handles[1].strengths()}
    assert reg.strengths() == expected


@pytest.mark.parametrize("term", TERMS)
def test_resume_is_bit_exact(term):
    straight, broken = network(), network()
    optimizers = two(straight)
    tk.regularize(straight, optimizers, TERMS[term])
    train(straight, optimizers, 7, (1, 2))
    train(straight, optimizers, 6, (1, 2))
    first = two(broken)
    before = tk.regularize(broken, first, TERMS[term])
    train(broken, first, 7, (1, 2))
    parts = [broken, *first, before]
    saved = pickle.loads(pickle.dumps([part.state_dict() for part in parts]))
    resumed = network()
    second = two(resumed)
    after = tk.regularize(resumed, second, TERMS[term])
    for part, state in zip([resumed, *second, after], saved):
        part.load_state_dict(state)
    train(resumed, second, 6, (1, 2))
    assert equal(straight, resumed)


def test_the_state_of_another_number_of_optimizers_is_refused():
    model = network()
    state = tk.regularize(model, two(model), tk.L1(0.1)).state_dict()
    other = network()
    reg = tk.regularize(other, optim.SGD(other.parameters(), lr=0.1), tk.L1(0.1))
    with pytest.raises(ValueError, match="state is of 2 optimizers, this Regularizer has 1"):
        reg.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alone(copied):
    model = network()
    optimizers = two(model)
    reg = tk.regularize(model, optimizers, TERMS["schedule"])
    train(model, optimizers, 3, (1, 2))
    twin, pair, other = copied((model, optimizers, reg))
    train(model, optimizers, 4, (1, 2))
    train(twin, pair, 4, (1, 2))
    assert equal(model, twin)
    assert other.strengths() == reg.strengths()


def test_audit_knows_all_optimizers():
    model = network()
    reg = tk.regularize(model, two(model), tk.L1(0.1))
    assert [reg.audit()[name].note for name in ("0.weight", "2.weight")] == ["", ""]
    assert repr(reg) == "Regularizer(0.weight/L1, 2.weight/L1; SGD, AdamW, step 0)"
    assert len(reg.optimizers) == 2
    reg.remove()
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in reg.optimizers)


def test_an_empty_list_is_named():
    with pytest.raises(ValueError, match="needs an optimizer, received an empty list"):
        tk.regularize(network(), [], tk.L1(0.1))


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


KINDS = [optim.SGD, optim.Adam]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS])
def test_two_players_raise_no_alarm(kinds, to_none, silent):
    """A GAN: the gradients of one player's step lie in the other's parameters."""
    model = nn.ModuleDict({"g": nn.Linear(3, 3), "d": nn.Linear(3, 1)})
    g, d = (kind(model[key].parameters(), lr=0.01) for kind, key in zip(kinds, "gd"))
    handles = [tk.regularize(model, d, tk.L1(1e-3)), tk.regularize(model, g, tk.L1(1e-3))]
    for _ in range(4):
        for optimizer, sign in ((d, 1), (d, 1), (g, -1)):
            optimizer.zero_grad(set_to_none=to_none)
            (sign * model["d"](model["g"](torch.randn(4, 3))).sum()).backward()
            optimizer.step()
            for handle in handles:
                handle.sparsity(), handle.value()


@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS])
def test_two_optimizers_of_one_trunk_raise_no_alarm(kinds, silent):
    model = nn.ModuleDict({k: nn.Linear(3, 3) for k in ("trunk", "a", "b")})
    pair = [
        kind([*model["trunk"].parameters(), *model[key].parameters()], lr=0.01)
        for kind, key in zip(kinds, "ab")
    ]
    reg = tk.regularize(model, pair[0], {"trunk.weight": tk.L1(1e-3)})
    for _ in range(4):
        for optimizer, key in zip(pair, "ab"):
            optimizer.zero_grad()
            model[key](model["trunk"](torch.randn(4, 3))).square().sum().backward()
            optimizer.step()
            reg.sparsity()


@pytest.mark.parametrize("phases", ["ab", "ba", "aabb", "bbaab"])
def test_optimizers_that_take_turns_on_a_parameter_both_act(phases, silent):
    """One optimizer first, another to finish, as from Adam to SGD."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    pair = {name: optim.SGD(model.parameters(), lr=0.1) for name in "ab"}
    reg = tk.regularize(model, pair, tk.L1(0.5))
    for name in phases:
        for _ in range(3):
            model.weight.grad = torch.zeros_like(model.weight)
            pair[name].step()
            reg.sparsity(), reg.value()
    expected = 1 - 0.05 * 3 * len(phases)
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), expected))
    model.weight.data.add_(1.0)
    for _ in range(99):
        model.weight.grad = torch.zeros_like(model.weight)
        optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.warns(UserWarning, match="penalty inactive"):
        reg.value()


SEVERAL = {
    "list": list,
    "tuple": tuple,
    "dict": lambda two: {str(i): one for i, one in enumerate(two)},
    "values of a dict": lambda two: {str(i): one for i, one in enumerate(two)}.values(),
    "generator": iter,
}


@pytest.mark.parametrize("form", SEVERAL)
def test_several_optimizers_may_come_in_any_form(form):
    ends = []
    for given in (list, SEVERAL[form]):
        model = network()
        optimizers = two(model)
        reg = tk.regularize(model, given(optimizers), tk.L1(0.05))
        train(model, optimizers, 5)
        ends.append((model, reg.sparsity()))
    assert equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
