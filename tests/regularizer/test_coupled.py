"""L2 in objective mode is the optimizer's own weight_decay: its bits, groups and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import equal

MAKERS = [
    partial(optim.SGD, lr=0.1),
    partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    partial(optim.ASGD, lr=0.1),
    partial(optim.Adam, lr=0.1, amsgrad=True),
    partial(optim.Adam, lr=0.1, fused=True),
    partial(optim.NAdam, lr=0.1),
    partial(optim.RAdam, lr=0.1, maximize=True),
    partial(optim.Adamax, lr=0.1),
    partial(optim.RMSprop, lr=0.1, centered=True),
    partial(optim.Adagrad, lr=0.1),
    partial(optim.Adadelta, lr=1.0),
]
TERMS = {"0.weight": tk.L2(0.3), "2.weight": [tk.L2(0.1), tk.L2(0.05)]}


def named(make):
    return f"{make.func.__name__}-{'-'.join(make.keywords)}"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def gradients(model, seed):
    source = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=source)


@pytest.mark.parametrize("make", MAKERS, ids=named)
def test_bits_are_those_of_weight_decay_on_the_same_parameters(make):
    ours, theirs = network(), network()
    optimizer = make(ours.parameters())
    reg = tk.regularize(ours, optimizer, TERMS)
    first, _, second = theirs
    own = make(
        [
            {"params": [first.weight], "weight_decay": 0.3},
            {"params": [second.weight], "weight_decay": 0.1 + 0.05},
            {"params": [first.bias, second.bias]},
        ]
    )
    for step in range(6):
        gradients(ours, step)
        gradients(theirs, step)
        if step == 3:
            reg.trace()  # a step that is measured has the same bits
        optimizer.step()
        own.step()
    assert equal(ours, theirs)


@pytest.mark.parametrize("make", MAKERS, ids=named)
def test_the_optimizer_reads_the_gradients_of_the_user_and_keeps_its_groups(make, monkeypatch):
    model = network()
    optimizer = make(model.parameters())
    tk.regularize(model, optimizer, TERMS)
    groups, (group,) = optimizer.param_groups, optimizer.param_groups
    inside, init_group = {}, optimizer._init_group

    def seen(part, *lists):
        inside.update({id(p): (part["weight_decay"], p.grad) for p in part["params"]})
        return init_group(part, *lists)

    monkeypatch.setattr(optimizer, "_init_group", seen)
    gradients(model, 0)
    optimizer.step()
    own = {id(p): p.grad for p in model.parameters()}
    assert optimizer.param_groups is groups and groups[0] is group
    assert group["weight_decay"] == 0 and len(group["params"]) == 4
    assert all(inside[key][1] is gradient for key, gradient in own.items())
    assert inside[id(model[0].weight)][0] == 0.3 and inside[id(model[0].bias)][0] == 0


REGISTERED = {
    "pre": optim.Optimizer.register_step_pre_hook,
    "post": optim.Optimizer.register_step_post_hook,
}


@pytest.mark.parametrize("handles", [1, 2])
@pytest.mark.parametrize("register", REGISTERED)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_others_see_and_set_the_groups_of_the_optimizer(register, before, handles):
    """A checkpoint saved by a hook, a learning rate set by the group's number."""
    model, plain = network(), network()
    optimizer, own = (
        optim.SGD([{"params": m[0].parameters()}, {"params": m[2].parameters()}], lr=0.1)
        for m in (model, plain)
    )
    saved = []

    def hook(one, *_):
        saved.append(one.state_dict()["param_groups"])
        for number, group in enumerate(one.param_groups):
            group["lr"] = 0.01 * (1 + number)

    def attach():
        for layer in ("0.weight", "2.weight")[:handles]:
            tk.regularize(model, optimizer, {layer: tk.L2(0.3)})

    if not before:
        attach()
    REGISTERED[register](optimizer, hook)
    REGISTERED[register](own, hook)
    if before:
        attach()
    for step in range(2):
        gradients(model, step)
        gradients(plain, step)
        for number in (0, 2)[:handles]:
            plain[number].weight.grad.add_(plain[number].weight.detach(), alpha=0.3)
        optimizer.step()
        own.step()
        assert saved[-1] == saved[-2]
    assert equal(model, plain)
    assert optimizer.state_dict()["param_groups"] == own.state_dict()["param_groups"]


def test_a_step_that_raises_leaves_the_groups(monkeypatch):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, TERMS)
    groups = optimizer.param_groups

    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr(optimizer, "_init_group", fail)
    gradients(model, 0)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert optimizer.param_groups is groups and groups[0]["weight_decay"] == 0


@pytest.mark.parametrize(
    "make", [optim.AdamW, partial(optim.Adam, decoupled_weight_decay=True), optim.Rprop]
)
def test_other_optimizers_are_given_the_sum(make):
    model, plain = network(), network()
    options = {} if make is optim.Rprop else {"weight_decay": 0.0}
    optimizer, own = (make(one.parameters(), lr=0.1, **options) for one in (model, plain))
    tk.regularize(model, optimizer, {"0.weight": tk.L2(0.3)})
    for step in range(3):
        gradients(model, step)
        gradients(plain, step)
        plain[0].weight.grad.add_(plain[0].weight.detach(), alpha=0.3)
        optimizer.step()
        own.step()
    assert equal(model, plain)
