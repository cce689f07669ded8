"""Scales, learning rates, first weights, sizes: what numbers do to a run."""

from __future__ import annotations

import torch
from torch import nn

from programs.developed import data
from programs.developed.nets import adam, conv, mlp, sgd, step_by_step
from programs.developed.twins import hits, parts, twins
from programs.form import Parts, Program

CE = nn.CrossEntropyLoss()
PROGRAMS: list[Program] = []


@twins(
    PROGRAMS,
    "unscaled_inputs",
    "https://stackoverflow.com/questions/39525358",
    "oscillating_loss",
    "exploding_gradient",
    "dying_relu",
    low=0.7,
    high=0.9,
)
def cancer_as_measured(right: bool) -> Parts:
    x, y = data.cancer()
    x = data.scaled(x) if right else x
    return parts(mlp(30, 24, 2, act=nn.Tanh), (x, y), CE, sgd(0.05))


@twins(
    PROGRAMS,
    "unscaled_inputs",
    "https://stackoverflow.com/questions/44066044",
    "oscillating_loss",
    "dying_relu",
    "exploding_gradient",
    "saturated_activation",
    low=-0.95,
    high=0.8,
)
def money_beside_age(right: bool) -> Parts:
    x, y = data.waves()
    x = x if right else x * torch.tensor([1.0, 1e4, 300.0, 1.0]) + torch.tensor([0, 5e4, 0, 40.0])
    return parts(mlp(4, 24, 24, 1), (x, y), nn.MSELoss(), adam(3e-3))


@twins(
    PROGRAMS,
    "unscaled_inputs",
    "https://stackoverflow.com/questions/55328966",
    "oscillating_loss",
    "exploding_gradient",
    "dying_relu",
    "saturated_activation",
    low=0.35,
    high=0.85,
)
def grey_values_up_to_255(right: bool) -> Parts:
    x, y = data.digits()
    x = x if right else 255 * x
    return parts(mlp(64, 50, 10, act=nn.Sigmoid), (x, y), CE, sgd(0.5), steps=300)


@twins(
    PROGRAMS,
    "unscaled_targets",
    "https://stackoverflow.com/questions/52800582",
    "slow_convergence",
    "unscaled_inputs",
    "exploding_gradient",
    low=-0.35,
    high=0.95,
)
def a_fourth_power(right: bool) -> Parts:
    x = torch.linspace(-100, 100, 400)[:, None]
    y = x**4
    if right:
        x, y = data.scaled(x), data.scaled(y)
    return parts(mlp(1, 50, 50, 1, act=nn.ELU), (x, y), nn.MSELoss(), adam(5e-3), steps=400)


@twins(
    PROGRAMS,
    "exploding_gradient",
    "https://stackoverflow.com/questions/48934338",
    "unscaled_targets",
    "oscillating_loss",
    "dying_relu",
    low=0.05,
    high=0.95,
)
def a_parabola_with_long_steps(right: bool) -> Parts:
    g = data.seeded(3)
    x = 5 * torch.rand(200, 1, generator=g)
    y = 5 * x**2 + torch.randn(200, 1, generator=g)
    if right:
        x, y = data.scaled(x), data.scaled(y)
    return parts(mlp(1, 50, 30, 1), (x, y), nn.MSELoss(), sgd(0.1), steps=300)


@twins(
    PROGRAMS,
    "slow_convergence",
    "https://stats.stackexchange.com/questions/376851",
    low=0.1,
    high=0.95,
)
def tiny_steps_of_an_lstm(right: bool) -> Parts:
    net = step_by_step(nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1))
    return parts(net, data.forecasts(), nn.MSELoss(), adam(0.01 if right else 2e-6))


@twins(
    PROGRAMS,
    "poor_init",
    "https://community.deeplearning.ai/t/why-dont-weights-get-adjusted-when-initialized-to-0/431799",
    "vanishing_gradient",
    low=0.15,
    high=0.85,
)
def all_weights_zero(right: bool) -> Parts:
    net = mlp(64, 32, 10)
    if not right:
        for p in net.parameters():
            nn.init.zeros_(p)
    return parts(net, data.digits(), CE, sgd(0.2))


@twins(
    PROGRAMS,
    "poor_init",
    "https://github.com/c-schicho/ZeroInitializationSymmetry",
    "underfitting",
    low=0.75,
    high=0.9,
)
def all_weights_equal(right: bool) -> Parts:
    net = mlp(2, 16, 2)
    if not right:
        for p in net.parameters():
            nn.init.constant_(p, 0.1)
    return parts(net, data.rings(), CE, adam(0.02), steps=300)


@twins(
    PROGRAMS,
    "vanishing_gradient",
    "https://stackoverflow.com/questions/39217567",
    "poor_init",
    low=0.35,
    high=0.9,
)
def six_sigmoid_layers(right: bool) -> Parts:
    act = nn.ReLU if right else nn.Sigmoid
    return parts(mlp(12, *[24] * 6, 4, act=act), data.blobs(), CE, sgd(0.1), steps=300)


@twins(
    PROGRAMS,
    "exploding_gradient",
    "https://chenzhang.org/notes/developer/loss-and-accuracy-get-stuck-in-keras/",
    "dying_relu",
    "oscillating_loss",
    low=0.15,
    high=0.8,
)
def long_steps(right: bool) -> Parts:
    return parts(conv(8, 8), data.pictures(), CE, sgd(0.1 if right else 20.0))


@twins(
    PROGRAMS,
    "overfitting",
    "https://github.com/paarthneekhara/byteNet-tensorflow/issues/10",
    low=0.75,
    high=0.75,
)
def sixty_rows(right: bool) -> Parts:
    x, y = data.blobs(rows=900, size=30)
    flip = torch.rand(len(y), generator=data.seeded(8)) < 0.25
    y = torch.where(flip, torch.randint(4, y.shape, generator=data.seeded(9)), y)
    rows = 600 if right else 40
    net = mlp(30, 16, 4) if right else mlp(30, 256, 256, 4)
    steps, lr = (150, 3e-3) if right else (300, 3e-3)
    valid = (x[600:], y[600:])
    return parts(
        net, (x[:rows], y[:rows]), CE, adam(lr), score=hits(*valid), valid=valid, steps=steps
    )


@twins(
    PROGRAMS,
    "slow_convergence",
    "https://stackoverflow.com/questions/50306988",
    "underfitting",
    low=0.55,
    high=0.95,
)
def two_sigmoid_units_for_five_epochs(right: bool) -> Parts:
    low = 0.2 + 0.2 * torch.rand(200, 2)
    high = 0.5 + 0.2 * torch.rand(200, 2)
    x, y = torch.cat([low, high]), torch.arange(400) // 200
    step = adam(0.05 if right else 1e-4)
    return parts(mlp(2, 2, 2, act=nn.Sigmoid), (x, y), CE, step, batch_size=32, steps=120)
