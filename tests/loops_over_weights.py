"""More training loops: weights that are put back, stand still, or fade from sight on purpose.

They join the lists of `training_loops`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from training_loops import CE, STEPS, adam, batches, broken, healthy, net, sgd, step, watched


@broken("weights_overwritten")
def first_weights_loaded_in_each_round():
    """Between two readings, so that only the version of a tensor tells."""
    model = net()
    start, optimizer = copy.deepcopy(model.state_dict()), sgd(model)
    with watched(model, optimizer, every=7) as health:
        for number, (x, y) in enumerate(batches()):
            if number % 10 == 0:
                model.load_state_dict(start)
            step(model, optimizer, x, y)
    return health


@broken("weights_overwritten")
def averaged_weights_left_in_after_each_evaluation():
    """Half a percent to a few percent of their size, again and again."""
    model = net()
    average, optimizer = copy.deepcopy(model).requires_grad_(False), sgd(model, 0.05)
    with watched(model, optimizer) as health:
        for number, (x, y) in enumerate(batches()):
            step(model, optimizer, x, y)
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters()):
                    slow.lerp_(fast, 0.01)
            if number % 10 == 9:
                model.load_state_dict(average.state_dict())
    return health


@broken("learning_rate_collapsed")
def warm_up_by_a_whole_division():
    model = net()
    optimizer = adam(model)
    schedule = schedules.LambdaLR(optimizer, lambda k: k // 1000)
    with watched(model, optimizer) as health:
        for x, y in batches():
            step(model, optimizer, x, y)
            schedule.step()
    return health


@broken("unmoved_parameters")
def most_of_bfloat16_stands_still():
    model = net()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.3)
    model = model.bfloat16()
    optimizer = adam(model, 3e-4)
    with watched(model, optimizer) as health:
        for x, y in batches():
            step(model, optimizer, x.bfloat16(), y, lambda o, t: CE(o.float(), t))
    return health


@broken("vanishing_gradient")
def twenty_sigmoid_layers():
    """Steps that round to nothing follow from it, and no learning rate helps."""
    layers = [m for _ in range(20) for m in (nn.Linear(10, 10), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(10, 2))
    optimizer = sgd(model)
    with watched(model, optimizer) as health:
        for x, y in batches():
            step(model, optimizer, x, y)
    return health


@healthy
def a_mean_over_many_pixels():
    """Each pixel has a small share of the signal, all of them together have all of it."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    optimizer = adam(model, 1e-2)
    with watched(model, optimizer) as health:
        for _ in range(30):
            y = torch.arange(8) % 2
            x = torch.randn(8, 1, 32, 32) + y[:, None, None, None]
            step(model, optimizer, x, y)
    return health


@healthy
def a_head_of_zeros_in_small_steps():
    model = net()
    nn.init.zeros_(model[2].weight)
    optimizer = sgd(model, 1e-4)
    with watched(model, optimizer) as health:
        for x, y in batches(60):
            step(model, optimizer, x, y)
    return health


@healthy
def half_of_the_way_back_each_fifth_step():
    """A look ahead: slow weights in the place of the fast ones, on purpose."""
    model = net()
    optimizer = sgd(model, 0.05)
    slow = copy.deepcopy(model.state_dict())
    with watched(model, optimizer) as health:
        for number, (x, y) in enumerate(batches()):
            step(model, optimizer, x, y)
            if number % 5 == 4:
                slow = {n: (v + slow[n]) / 2 for n, v in model.state_dict().items()}
                model.load_state_dict(slow)
    return health


@healthy
def the_best_weights_so_far_loaded_back():
    """Other ones each time: what was learned in between is kept where it is better."""
    model = net()
    optimizer = adam(model, 1e-2)
    best, lowest = copy.deepcopy(model.state_dict()), float("inf")
    with watched(model, optimizer) as health:
        for number, (x, y) in enumerate(batches(STEPS)):
            loss = float(step(model, optimizer, x, y))
            if loss < lowest:
                best, lowest = copy.deepcopy(model.state_dict()), loss
            if number % 40 == 39:
                model.load_state_dict(best)
    return health


def _clients(*, rounds=6, clients=4, combine=None, kept=True):
    """Each client trains from the same weights; what follows is made of what they learned."""
    model = net()
    optimizer = sgd(model, 0.2, momentum=0.5)
    shared = copy.deepcopy(model.state_dict())
    parts = [list(batches(8)) for _ in range(clients)]
    with watched(model, optimizer) as health:
        for _ in range(rounds):
            learned = []
            for part in parts:
                model.load_state_dict(shared)
                for x, y in part:
                    step(model, optimizer, x, y)
                if kept:
                    learned.append(copy.deepcopy(model.state_dict()))
            if combine is not None:
                shared = {n: combine([c[n] for c in learned]) for n in shared}
    return health


@healthy
def the_mean_of_several_clients():
    return _clients(combine=lambda c: sum(c) / len(c))


@healthy
def a_weighted_mean_of_two_clients():
    return _clients(clients=2, combine=lambda c: 0.7 * c[0] + 0.3 * c[1])


@healthy
def the_mean_of_many_clients():
    return _clients(rounds=3, clients=12, combine=lambda c: sum(c) / len(c))


@broken("weights_overwritten")
def clients_whose_mean_is_never_loaded():
    return _clients()


@broken("weights_overwritten")
def clients_that_are_asked_for_nothing():
    return _clients(kept=False)


@broken("weights_overwritten")
def weights_drawn_anew_after_the_clients():
    return _clients(combine=lambda c: torch.randn_like(c[0]) * c[0].std())


# rates, limits and decay


def _plain(optimizer, *, limit=math.inf, steps=100, slope=nn.ReLU):
    model = nn.Sequential(nn.Linear(10, 32), slope(), nn.Linear(32, 32), slope(), nn.Linear(32, 2))
    engine = optimizer(model.parameters())
    with watched(model, engine) as health:
        for x, y in batches(steps):
            engine.zero_grad()
            CE(model(x), y).backward()
            nn.utils.clip_grad_value_(model.parameters(), limit)
            engine.step()
    return health


@broken("exploding_gradient")
def a_momentum_that_multiplies_the_rate():
    return _plain(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), slope=nn.Tanh)


@broken("slow_convergence")
def gradients_that_are_clipped_to_next_to_nothing():
    return _plain(lambda p: torch.optim.SGD(p, lr=0.05), limit=1e-5)


@healthy
def gradients_of_adam_that_are_clipped_to_next_to_nothing():
    return _plain(lambda p: torch.optim.Adam(p, lr=1e-3), limit=1e-5)


@broken("decay_too_strong")
def a_decay_of_ten():
    return _plain(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=10.0))


@broken("decay_too_strong")
def a_decay_that_momentum_multiplies():
    return _plain(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.2))


@healthy
def a_usual_decay():
    return _plain(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))


# networks and inputs beside the model


def _taught(*, train):
    """A frozen teacher with norms, on other rows than its own."""
    model = net()
    teacher = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    teacher(torch.randn(64, 10))
    teacher.requires_grad_(False).train(train)
    engine = adam(model)
    with watched(model, engine) as health:
        for x, _ in batches():
            step(model, engine, 2 * x + 1, teacher(2 * x + 1).softmax(1))
    return health


@broken("frozen_norms_move")
def a_teacher_in_train_mode():
    return _taught(train=True)


@healthy
def a_teacher_in_eval_mode():
    return _taught(train=False)


@healthy
def a_critic_with_norms_that_is_frozen_in_turns():
    model = nn.Linear(4, 10)
    critic = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    engine, other = adam(model), adam(critic)
    with watched(model, engine) as health:
        for _ in range(40):
            critic.requires_grad_(True)
            other.zero_grad()
            made, real = model(torch.randn(16, 4)).detach(), torch.randn(16, 10)
            (critic(made) - critic(real)).mean().backward()
            other.step()
            critic.requires_grad_(False)
            engine.zero_grad()
            (-critic(model(torch.randn(16, 4))).mean()).backward()
            engine.step()
    return health


@healthy
def derivatives_by_the_inputs():
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    times = torch.linspace(0, 1, 20)[:, None].requires_grad_()
    engine = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure():
        engine.zero_grad()
        values = model(times)
        (slopes,) = torch.autograd.grad(values.sum(), times, create_graph=True)
        loss = (slopes + values).square().mean() + (model(torch.zeros(1, 1)) - 1).square().sum()
        loss.backward()
        return loss

    with watched(model, engine, every=2) as health:
        for _ in range(24):
            engine.step(closure)
    return health


@healthy
def a_part_of_the_way_of_each_task():
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    engine = sgd(model, 0.02)
    with watched(model, engine) as health:
        for _ in range(20):
            before = copy.deepcopy(model.state_dict())
            x = 10 * torch.rand(20, 1) - 5
            y = (0.5 + 4 * torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
            for _ in range(10):
                step(model, engine, x, y, nn.functional.mse_loss)
            after = model.state_dict()
            model.load_state_dict({n: before[n].lerp(after[n], 0.3) for n in before})
    return health


def _averaged(decay):
    """An average for the evaluation after the loop."""
    model = net()
    average, engine = copy.deepcopy(model).requires_grad_(False), adam(model, 1e-2)
    with watched(model, engine) as health:
        for x, y in batches(120):
            step(model, engine, x, y)
            for kept, new in zip(average.parameters(), model.parameters()):
                kept.lerp_(new.detach(), 1 - decay)
    return health


@broken("average_lags")
def an_average_over_more_steps_than_the_loop_has():
    return _averaged(0.9999)


@healthy
def an_average_over_the_last_steps():
    return _averaged(0.95)
