"""Training loops of kinds that reports describe: slopes, rates, states, targets.

They join the lists of `training_loops`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from training_loops import CE, adam, batches, broken, healthy, net, sgd, step, watched

# slopes


def _penalised(*, graph):
    critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))
    engine = adam(critic)
    with watched(critic, engine) as health:
        for _ in range(40):
            x = torch.randn(32, 2).requires_grad_()
            (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=graph)
            engine.zero_grad()
            penalty = (slope.norm(dim=1) - 1).square().mean()
            ((critic(x.detach()) - x.detach()[:, :1]).square().mean() + penalty).backward()
            engine.step()
    return health


@broken("loss_not_connected")
def a_penalty_on_slopes_without_their_graph():
    return _penalised(graph=False)


@healthy
def a_penalty_on_slopes():
    return _penalised(graph=True)


@healthy
def rows_that_are_moved_along_their_slopes():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            x.requires_grad_()
            (slope,) = torch.autograd.grad(CE(model(x), y), x)
            step(model, engine, (x + 0.1 * slope.sign()).detach(), y)
    return health


# rates


def _rated(write):
    model = net()
    engine = sgd(model, 1e-2)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            step(model, engine, x, y)
            if k == 20:
                write(engine)
    return health


@broken("rate_beside_groups")
def a_rate_that_is_an_attribute():
    return _rated(lambda engine: setattr(engine, "lr", 0.1))


@broken("rate_beside_groups")
def a_rate_among_the_defaults():
    return _rated(lambda engine: engine.defaults.update(lr=0.1))


@healthy
def a_rate_in_the_groups_and_beside_them():
    def write(engine):
        engine.lr = engine.param_groups[0]["lr"] = 0.1

    return _rated(write)


def _by_a_function(factor, rate=0.03):
    model = net()
    engine = sgd(model, rate)
    schedule = LambdaLR(engine, factor)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
            schedule.step()
    return health


@broken("slow_convergence")
def a_function_that_gives_the_rate():
    return _by_a_function(lambda k: 0.03 * 0.99**k)


@healthy
def a_function_that_gives_a_factor():
    return _by_a_function(lambda k: 0.99**k)


@healthy
def a_warm_up_whose_first_factor_is_the_rate():
    return _by_a_function(lambda k: min(1.0, 0.03 * (k + 1)))


def _resumed(rate):
    model = net()
    engine = adam(model)
    engine.load_state_dict(adam(model, rate).state_dict())
    with watched(model, engine, every=25) as health:
        for x, y in batches(130):
            step(model, engine, x, y)
    return health


@broken("slow_convergence")
def a_rate_that_a_schedule_has_left():
    return _resumed(3e-8)


@healthy
def a_rate_for_the_last_steps_of_fine_tuning():
    return _resumed(1e-5)


# states


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.head = nn.GRUCell(2, 8), nn.Linear(8, 2)


def _unrolled(cut):
    model = Cell()
    engine = adam(model)
    state = torch.zeros(16, 8)
    with watched(model, engine) as health:
        for _ in range(40):
            kind = torch.randint(2, (16,))
            state = cut(state, 0)
            for k in range(5):
                seen = F.one_hot(kind, 2) + torch.randn(16, 2)
                state = model.step(seen, cut(state, k))
            engine.zero_grad()
            CE(model.head(state), kind).backward()
            engine.step()
    return health


@broken("state_cut_off")
def a_state_that_is_cut_off_at_every_call():
    return _unrolled(lambda state, k: state.detach())


@healthy
def a_state_that_is_cut_off_once_a_sequence():
    return _unrolled(lambda state, k: state if k else state.detach())


@healthy
def a_cell_that_begins_anew_at_every_call():
    return _unrolled(lambda state, k: torch.randn(16, 8))


# targets


def _of_itself(copied):
    online = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    target = copied(online)
    engine = adam(online, 1e-2)
    with watched(online, engine) as health:
        for k, (x, y) in enumerate(batches(110)):
            with torch.no_grad():
                goal = y[:, None].float() + 0.5 * target(torch.roll(x, 1))
            step(online, engine, x, goal, F.mse_loss)
            if k % 25 == 24:
                target.load_state_dict(online.state_dict())
    return health


@broken("target_always_copied")
def a_target_that_is_the_network():
    return _of_itself(lambda online: online)


@broken("target_always_copied")
def a_target_that_is_a_shallow_copy():
    return _of_itself(copy.copy)


@healthy
def a_network_that_is_called_a_target_elsewhere():
    target_network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))

    def trained(model):
        engine = adam(model)
        with watched(model, engine) as health:
            for x, y in batches(110):
                step(model, engine, x, y)
        return health

    return trained(target_network)
