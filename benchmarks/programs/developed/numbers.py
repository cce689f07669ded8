"""Scales, learning rates, first weights, sizes: what numbers do to a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from programs._form import Setup, program
from programs.developed import data
from programs.developed.nets import adam, conv, mlp, sgd, step_by_step

CE = nn.CrossEntropyLoss()


@program("unscaled_inputs", "https://stackoverflow.com/questions/39525358",
         ("oscillating_loss", "exploding_gradient", "dying_relu"))
def cancer_as_measured(right: bool) -> Setup:
    x, y = data.cancer()
    x = data.scaled(x) if right else x
    return Setup(mlp(30, 24, 2, act=nn.Tanh), (x, y), CE, sgd(0.05))


@program("unscaled_inputs", "https://stackoverflow.com/questions/44066044",
         ("oscillating_loss", "dying_relu", "exploding_gradient", "saturated_activation"))
def money_beside_age(right: bool) -> Setup:
    x, y = data.waves()
    x = x if right else x * torch.tensor([1.0, 1e4, 300.0, 1.0]) + torch.tensor([0, 5e4, 0, 40.0])
    return Setup(mlp(4, 24, 24, 1), (x, y), nn.MSELoss(), adam(3e-3))


@program("unscaled_inputs", "https://stackoverflow.com/questions/55328966",
         ("oscillating_loss", "exploding_gradient", "dying_relu", "saturated_activation"))
def grey_values_up_to_255(right: bool) -> Setup:
    x, y = data.digits()
    x = x if right else 255 * x
    return Setup(mlp(64, 50, 10, act=nn.Sigmoid), (x, y), CE, sgd(0.5), {"steps": 300})


@program("unscaled_targets", "https://stackoverflow.com/questions/52800582",
         ("slow_convergence", "unscaled_inputs", "exploding_gradient"))
def a_fourth_power(right: bool) -> Setup:
    x = torch.linspace(-100, 100, 400)[:, None]
    y = x**4
    if right:
        x, y = data.scaled(x), data.scaled(y)
    return Setup(mlp(1, 50, 50, 1, act=nn.ELU), (x, y), nn.MSELoss(), adam(5e-3), {"steps": 400})


@program("exploding_gradient", "https://stackoverflow.com/questions/48934338",
         ("unscaled_targets", "oscillating_loss", "dying_relu"))
def a_parabola_with_long_steps(right: bool) -> Setup:
    g = data.seeded(3)
    x = 5 * torch.rand(200, 1, generator=g)
    y = 5 * x**2 + torch.randn(200, 1, generator=g)
    if right:
        x, y = data.scaled(x), data.scaled(y)
    return Setup(mlp(1, 50, 30, 1), (x, y), nn.MSELoss(), sgd(0.1), {"steps": 300})


@program("unscaled_targets", "http://stackoverflow.com.mevn.net/questions/52800582", ("slow_convergence",))
def diabetes_as_measured(right: bool) -> Setup:
    x, y = data.diabetes()
    return Setup(mlp(10, 32, 1), (x, data.scaled(y) if right else y), nn.MSELoss(), adam(2e-3))


@program("slow_convergence", "https://stackoverflow.com/questions/34311586",
         ("vanishing_gradient", "poor_init"))
def tiny_steps(right: bool) -> Setup:
    return Setup(mlp(64, 32, 10), data.digits(), CE, sgd(0.1 if right else 1e-5))


@program("slow_convergence", "https://stats.stackexchange.com/questions/376851", ())
def tiny_steps_of_an_lstm(right: bool) -> Setup:
    net = step_by_step(nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1))
    return Setup(net, data.forecasts(), nn.MSELoss(), adam(0.01 if right else 2e-6))


@program("poor_init", "https://community.deeplearning.ai/t/why-dont-weights-get-adjusted-when-initialized-to-0/431799",
         ("vanishing_gradient",))
def all_weights_zero(right: bool) -> Setup:
    net = mlp(64, 32, 10)
    if not right:
        for p in net.parameters():
            nn.init.zeros_(p)
    return Setup(net, data.digits(), CE, sgd(0.2))


@program("poor_init", "https://github.com/c-schicho/ZeroInitializationSymmetry", ("underfitting",))
def all_weights_equal(right: bool) -> Setup:
    net = mlp(2, 16, 2)
    if not right:
        for p in net.parameters():
            nn.init.constant_(p, 0.1)
    return Setup(net, data.rings(), CE, adam(0.02), {"steps": 300})


@program("vanishing_gradient", "https://stackoverflow.com/questions/39217567", ("poor_init",))
def six_sigmoid_layers(right: bool) -> Setup:
    act = nn.ReLU if right else nn.Sigmoid
    return Setup(mlp(12, *[24] * 6, 4, act=act), data.blobs(), CE, sgd(0.1), {"steps": 300})


@program("vanishing_gradient", "https://ai.stackexchange.com/questions/27010/why-does-my-neural-network-to-solve-the-xor-problem-always-output-0-5",
         ("poor_init",))
def deep_tanh_with_small_weights(right: bool) -> Setup:
    net = mlp(64, *[32] * 10, 10, act=nn.Tanh)
    gain = 1.0 if right else 0.3
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain)
    return Setup(net, data.digits(), CE, adam(2e-3) if right else sgd(0.05))


@program("exploding_gradient", "https://w3toppers.com/neural-network-always-predicts-the-same-class/",
         ("poor_init", "saturated_activation", "oscillating_loss"))
def weights_of_deviation_one(right: bool) -> Setup:
    net = mlp(64, 64, 64, 64, 10)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0, (2 / p.shape[1]) ** 0.5 if right else 1.0)
    return Setup(net, data.digits(), CE, sgd(0.02))


@program("exploding_gradient", "https://chenzhang.org/notes/developer/loss-and-accuracy-get-stuck-in-keras/",
         ("dying_relu", "oscillating_loss"))
def long_steps(right: bool) -> Setup:
    return Setup(conv(8, 8), data.pictures(), CE, sgd(0.1 if right else 20.0))


@program("dying_relu", "https://stackoverflow.com/questions/48594888",
         ("exploding_gradient", "oscillating_loss"))
def long_steps_of_adam(right: bool) -> Setup:
    return Setup(conv(8, 16), data.pictures(), CE, adam(3e-3 if right else 0.5))


@program("oscillating_loss", "https://github.com/milesial/Pytorch-UNet/issues/65",
         ("exploding_gradient", "dying_relu"))
def momentum_of_a_hundred_steps(right: bool) -> Setup:
    step = sgd(0.02, momentum=0.9) if right else sgd(0.3, momentum=0.99)
    return Setup(mlp(64, 48, 10), data.digits(), CE, step)


@program("underfitting", "https://stackoverflow.com/questions/34673164", ("excessive_dropout",))
def nearly_all_dropped(right: bool) -> Setup:
    drop = nn.Dropout(0.2 if right else 0.95)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), drop, nn.Linear(48, 10))
    return Setup(net, data.digits(), CE, adam(3e-3))


@program("underfitting", "https://stackoverflow.com/questions/38648195", ())
def a_crushing_decay(right: bool) -> Setup:
    step = adam(3e-3, weight_decay=1e-5 if right else 3.0)
    return Setup(mlp(64, 48, 10), data.digits(), CE, step)


@program("underfitting", "https://stackoverflow.com/questions/50306988", ("slow_convergence",))
def one_unit_wide(right: bool) -> Setup:
    return Setup(mlp(64, 32 if right else 1, 10, act=nn.Tanh), data.digits(), CE, adam(5e-3),
                 {"steps": 300})


@program("overfitting", "https://github.com/keras-team/keras/issues/4325", ())
def sixty_rows(right: bool) -> Setup:
    x, y = data.blobs(rows=900, size=30)
    flip = torch.rand(len(y), generator=data.seeded(8)) < 0.25
    y = torch.where(flip, torch.randint(4, y.shape, generator=data.seeded(9)), y)
    rows = 600 if right else 40
    net = mlp(30, 16, 4) if right else mlp(30, 256, 256, 4)
    return Setup(net, (x[:rows], y[:rows]), CE, adam(1e-3 if right else 3e-3),
                 {"valid": (x[600:], y[600:]), "steps": 150 if right else 300})


class Long(nn.Module):
    """Remembers the first number of a long sequence."""

    def __init__(self, core: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


@program("vanishing_gradient", "https://github.com/pytorch/pytorch/issues/0", ("poor_init",))
def the_first_of_eighty_numbers(right: bool) -> Setup:
    x = torch.randn(500, 12 if right else 80, 1, generator=data.seeded(6))
    y = (x[:, 0, 0] > 0).long()
    core = nn.GRU(1, 24, batch_first=True) if right else nn.RNN(1, 24, batch_first=True)
    return Setup(Long(core), (x, y), CE, adam(0.01) if right else sgd(0.1), {"steps": 250})
