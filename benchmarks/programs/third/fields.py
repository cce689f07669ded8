"""Networks of coordinates, and networks that are taught by an equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def scene(rows: int, waves: float = 3.0) -> tuple[Tensor, Tensor]:
    """Places of a square from -1 to 1, and the brightness of a picture there."""
    xy = 2 * torch.rand(rows, 2) - 1
    x, y = xy[:, :1], xy[:, 1:]
    return xy, torch.sin(waves * math.pi * x) * torch.cos(waves * math.pi * y) + 0.3 * x


class Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool, w0: float = 15.0) -> None:
        super().__init__()
        self.w0 = w0
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / w0
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * self.linear(x))


@faulty(
    "a first layer of sines drawn like the others",
    "https://github.com/lucidrains/siren-pytorch/issues/1",
    "poor_init",
    low=0.6,
    high=0.8,
    also=("underfitting", "slow_convergence"),
)
def first_sines(wrong: bool) -> Parts:
    xy, value = scene(2400)
    net = nn.Sequential(Sine(2, 48, True), Sine(48, 48, False), nn.Linear(48, 1))
    if wrong:
        with torch.no_grad():  # the bound of a layer of 48 inputs, divided by the frequency
            net[0].linear.weight.uniform_(-math.sqrt(6 / 48) / 15, math.sqrt(6 / 48) / 15)
    return Parts(
        net,
        (xy[:2000], value[:2000]),
        nn.MSELoss(),
        adam(net, 1e-3),
        r2(xy[2000:], value[2000:]),
        batch_size=128,
        steps=300,
    )


@faulty(
    "sines of pixel numbers",
    "https://github.com/vsitzmann/siren/issues/19",
    "unscaled_inputs",
    low=0.3,
    high=0.8,
    also=("saturated_activation",),
)
def pixel_numbers(wrong: bool) -> Parts:
    xy, value = scene(2400, 1.5)
    net = nn.Sequential(Sine(2, 48, True), Sine(48, 48, False), nn.Linear(48, 1))
    if wrong:
        xy = 64 * (xy + 1)
    return Parts(
        net,
        (xy[:2000], value[:2000]),
        nn.MSELoss(),
        adam(net, 1e-3),
        r2(xy[2000:], value[2000:]),
        batch_size=128,
        steps=300,
    )


class Plane(nn.Module):
    """A grid of features that is read between its points, and a small network behind it."""

    def __init__(self, halved: bool) -> None:
        super().__init__()
        self.grid = nn.Parameter(0.1 * torch.randn(1, 8, 16, 16))
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        self.halved = halved

    def forward(self, xy: Tensor) -> Tensor:
        if self.halved:  # places from 0 to 1, where grid_sample expects -1 to 1
            xy = (xy + 1) / 2
        found = F.grid_sample(self.grid, xy[None, None], align_corners=True)
        return self.head(found[0, :, 0].t())


@faulty(
    "three quarters of a plane that nobody reads",
    "https://github.com/nerfstudio-project/nerfstudio/pull/998",
    "coordinates_out_of_place",  # no code says it: the plane is read in one corner
    low=0.55,
    high=0.8,
    also=("underfitting", "unused_parameters"),
)
def one_corner(wrong: bool) -> Parts:
    xy, value = scene(3400, 5.5)
    net = Plane(wrong)
    return Parts(
        net,
        (xy[:3000], value[:3000]),
        nn.MSELoss(),
        adam(net, 1e-2),
        r2(xy[3000:], value[3000:]),
        batch_size=128,
        steps=300,
    )


class Octaves(nn.Module):
    def __init__(self, base: float, count: int = 4) -> None:
        super().__init__()
        self.register_buffer("pace", base * 2.0 ** torch.arange(count))

    def forward(self, xy: Tensor) -> Tensor:
        angle = (xy[..., None] * self.pace).flatten(1)
        return torch.cat([xy, angle.sin(), angle.cos()], 1)


@faulty(
    "octaves without their pi",
    "https://github.com/KanishJebaMathewM/Truxify/issues/12551",
    "underfitting",
    low=0.6,
    high=0.8,
    also=("slow_convergence",),
)
def octaves(wrong: bool) -> Parts:
    xy, value = scene(3400, 8.0)
    net = nn.Sequential(
        Octaves(1.0 if wrong else math.pi),
        nn.Linear(18, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 1),
    )
    return Parts(
        net,
        (xy[:3000], value[:3000]),
        nn.MSELoss(),
        adam(net, 3e-3),
        r2(xy[3000:], value[3000:]),
        batch_size=128,
        steps=400,
    )


def slope(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at, torch.ones_like(value), create_graph=True)[0]


@faulty(
    "an equation of second order and rectifiers",
    "https://github.com/NVIDIA/physicsnemo/pull/956",
    "no_second_derivative",  # no code says it: the residual has no gradient
    low=0.5,
    high=0.9,
    also=("loss_not_connected", "loss_ignores_targets", "no_nonlinearity"),
)
def second_order(wrong: bool) -> Parts:
    x = 2 * torch.rand(512, 1) - 1
    force = -(math.pi**2) * torch.sin(math.pi * x)  # u'' of u = sin(pi x)
    unit = nn.ReLU if wrong else nn.Tanh
    net = nn.Sequential(nn.Linear(1, 32), unit(), nn.Linear(32, 32), unit(), nn.Linear(32, 1))
    ends = torch.tensor([[-1.0], [1.0]])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        at = batch[0].clone().requires_grad_()
        bend = slope(slope(model(at), at), at)
        if not bend.requires_grad:
            bend = bend + 0 * model(at)
        return F.mse_loss(bend, batch[1]) + 10 * model(ends).square().mean()

    new = torch.linspace(-1, 1, 200)[:, None]
    return Parts(
        net,
        (x, force),
        loss,
        adam(net, 5e-3),
        r2(new, torch.sin(math.pi * new)),
        batch_size=64,
        steps=400,
    )


@faulty(
    "a Laplacian with mixed derivatives in it",
    "https://github.com/prateekbhustali/Physics-Informed-Neural-Networks/issues/4",
    "mixed_derivatives",  # no code says it: another equation is solved
    low=0.5,
    high=0.8,
)
def laplacian(wrong: bool) -> Parts:
    xy = 2 * torch.rand(800, 2) - 1

    def true(at: Tensor) -> Tensor:
        return torch.sin(2 * at[:, :1]) * torch.cos(2 * at[:, 1:])

    net = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    side = torch.linspace(-1, 1, 16)
    one = torch.ones(16)
    edge = torch.cat(
        [torch.stack(pair, 1) for pair in ((side, one), (side, -one), (one, side), (-one, side))]
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        at = batch[0].clone().requires_grad_()
        first = slope(model(at), at)
        if wrong:
            second = slope(first, at)
            whole = second[:, :1] + second[:, 1:]
        else:
            whole = slope(first[:, :1], at)[:, :1] + slope(first[:, 1:], at)[:, 1:]
        return F.mse_loss(whole, batch[1]) + 20 * F.mse_loss(model(edge), true(edge))

    new = 1.6 * torch.rand(400, 2) - 0.8
    return Parts(
        net,
        (xy, -8 * true(xy)),
        loss,
        adam(net, 5e-3),
        r2(new, true(new)),
        batch_size=64,
        steps=300,
    )
