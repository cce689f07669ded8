"""Starts, steps and restraints that keep a sound network from learning."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)
CE = nn.CrossEntropyLoss()


@faulty(
    "every weight the same",
    "https://github.com/HomericIntelligence/Mnemosyne/pull/1987",
    "poor_init",
    low=0.4,
    high=0.9,
    also=("vanishing_gradient",),
)
def same_weights(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    if wrong:
        for layer in model[::2]:
            nn.init.constant_(layer.weight, 0.05)
            nn.init.zeros_(layer.bias)
    return Parts(model, (x, y), CE, sgd(model, 0.1, momentum=0.9), accuracy(xt, yt), steps=250)


@faulty(
    "weights of zero",
    "https://github.com/wagonhelm/NaNmnist/issues/2",
    "poor_init",
    low=0.3,
    high=0.85,
    also=("vanishing_gradient",),
)
def zero_weights(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                          nn.Linear(32, 10))  # fmt: skip
    if wrong:
        for value in model.parameters():
            nn.init.zeros_(value)
    return Parts(model, (x, y), CE, adam(model, 3e-3), accuracy(xt, yt), steps=250)


@faulty(
    "ReLUs dead from the start",
    "https://github.com/Yang7879/3D-RecGAN/issues/6",
    "dying_relu",
    low=0.3,
    high=0.85,
    also=("poor_init",),
)
def dead(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    if wrong:
        nn.init.constant_(model[3].bias, -4.0)
    return Parts(model, (x, y), CE, adam(model, 5e-3), accuracy(xt, yt), steps=300)


@faulty(
    "six layers of sigmoids",
    "https://datafield.dev/aibook/part-03/chapter-12/case-study-01.html",
    "vanishing_gradient",
    low=0.4,
    high=0.9,
    also=("saturated_activation", "poor_init"),
)
def sigmoids(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    activation = nn.Sigmoid if wrong else nn.ReLU
    sizes = [64, 64, 64, 48, 48, 32, 32]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    if not wrong:
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return Parts(model, (x, y), CE, sgd(model, 0.02, momentum=0.9), accuracy(xt, yt), steps=400)


@faulty(
    "a learning rate that does not learn",
    "https://github.com/NLeSC/mcfly/issues/43",
    "oscillating_loss",
    low=0.6,
    high=0.85,
    also=("exploding_gradient", "dying_relu", "saturated_activation"),
)
def too_large(wrong: bool) -> Parts:
    y = torch.randint(4, (900,))
    time = torch.arange(24) / 24
    wave = torch.sin(6.3 * (y[:, None] + 1) * time + 0.5 * torch.randn(900, 1))
    x = (wave + 0.5 * torch.randn(900, 24))[:, None]
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(
        nn.Conv1d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv1d(16, 16, 5, 2, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip
    return Parts(
        model, (xs, ys), CE, adam(model, 0.3 if wrong else 3e-3), accuracy(xt, yt), steps=300
    )


@faulty(
    "momentum of 0.99",
    "https://github.com/keras-team/keras/issues/3687",
    "oscillating_loss",
    low=0.6,
    high=0.85,
    also=("exploding_gradient", "saturated_activation"),
)
def momentum(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface()
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
    engine = sgd(model, 0.07, momentum=0.99 if wrong else 0.9, nesterov=True)
    return Parts(model, (x, y), nn.MSELoss(), engine, r2(xt, yt), steps=300)


@faulty(
    "XOR in small steps",
    "https://stackoverflow.com/questions/31556268",
    "slow_convergence",
    low=0.75,
    high=0.95,
    also=("saturated_activation", "vanishing_gradient"),
)
def xor(wrong: bool) -> Parts:
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    x = corners.repeat(64, 1)
    y = (x.sum(1, True) == 1).float()
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())

    def score(m: nn.Module) -> float:
        return float(1 - 4 * (m(corners) - y[:4]).square().mean())  # 0 for a constant

    rate = 1e-3 if wrong else 1.0
    return Parts(model, (x, y), nn.MSELoss(), sgd(model, rate), score, steps=1500)


@faulty(
    "weights kept in bfloat16",
    "https://github.com/workofart/ml-by-hand/pull/85",
    "updates_lost",
    low=0.6,
    high=0.85,
)
def sixteen_bits(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.blobs(classes=6, inputs=16, apart=1.2)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 6))
    nn.init.normal_(model[3].weight, std=0.5)
    if wrong:
        model, x, xt = model.bfloat16(), x.bfloat16(), xt.bfloat16()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    return Parts(model, (x, y), loss, adam(model, 2e-4), accuracy(xt, yt), steps=800)


@faulty(
    "weight decay of one half",
    "https://github.com/BVLC/caffe/issues/1396",
    "underfitting",
    low=0.4,
    high=0.85,
    also=("vanishing_gradient",),
)
def decay(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    engine = sgd(model, 0.05, momentum=0.9, weight_decay=0.5 if wrong else 5e-4)
    return Parts(model, (x, y), CE, engine, accuracy(xt, yt), steps=250)


class Letters(nn.Module):
    """A recurrent network by hand over one-hot letters."""

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.step = nn.Linear(8 + 24, 24)
        self.out = nn.Linear(24, 3)
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 24)
        for letter in x.unbind(1):
            hidden = self.step(torch.cat([letter, hidden], 1))
            hidden = torch.tanh(hidden) if self.bounded else hidden
        return self.out(hidden)


@faulty(
    "a recurrence without bound",
    "https://github.com/pytorch/pytorch/issues/2623",
    "exploding_gradient",
    low=0.7,
    high=0.85,
    also=("poor_init", "no_nonlinearity"),
)
def recurrence(wrong: bool) -> Parts:
    names = torch.randint(8, (900, 18))
    y = names[:, -2:].sum(1) % 3
    (xs, ys), (xt, yt) = tasks.split(F.one_hot(names, 8).float(), y)
    model = Letters(bounded=not wrong)
    if wrong:
        nn.init.normal_(model.step.weight, std=0.45)
    clip = None if wrong else 1.0
    return Parts(model, (xs, ys), CE, adam(model), accuracy(xt, yt), clip=clip, steps=500)


class Graph(nn.Module):
    """Graph convolutions: the mean over neighbours on a ring with chords, then a linear map."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        links = torch.eye(12) + torch.eye(12).roll(1, 1) + torch.eye(12).roll(-1, 1)
        self.register_buffer("mean", (links + torch.eye(12).roll(5, 1)) / 4)
        sizes = [4, *[24] * depth]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.maps:
            x = torch.relu(layer(self.mean @ x))
        return self.head(x)


@faulty(
    "a graph network of sixteen layers",
    "https://github.com/DropEdge/DropEdge/issues/8",
    "oversmoothing",
    low=0.85,
    high=0.95,
    also=("vanishing_gradient", "poor_init"),
)
def graph(wrong: bool) -> Parts:
    x = torch.randn(600, 12, 4)
    model = Graph(16 if wrong else 2)
    around = model.mean @ (model.mean @ x)
    y = (around[..., 0] + 0.5 * around[..., 1] > 0).long()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    score = accuracy(xt, yt)
    return Parts(
        model, (xs, ys), lambda o, t: CE(o.transpose(1, 2), t), adam(model, 3e-3),
        lambda m: score(_classes_first(m)), batch_size=16, steps=300,
    )  # fmt: skip


def _classes_first(model: nn.Module) -> nn.Module:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x).transpose(1, 2)

    return Turned()
