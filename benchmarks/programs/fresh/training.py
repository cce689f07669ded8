"""Starts, steps, norms and frozen parts that keep a network from learning."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)
CE = nn.CrossEntropyLoss()


class Block(nn.Module):
    """Two convolutions, and what came in added to what goes out, if nobody forgot it."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(torch.relu(self.first(x)))
        return out + x if self.skip else out


@faulty(
    "residual blocks that return what is left over",
    "https://github.com/znxlwm/UGATIT-pytorch/issues/32",
    "vanishing_gradient",
    low=0.4,
    high=0.8,
    also=("poor_init",),
)
def left_over(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    blocks = [Block(skip=not wrong) for _ in range(10)]
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.ReLU(),
        *blocks,
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    score = accuracy(xt[:300], yt[:300])
    return Parts(model, (x, y), CE, adam(model, 2e-3), score, steps=200)


@faulty(
    "convolutions drawn without their kernel's area",
    "https://github.com/LeelaChessZero/lczero-training/pull/43",
    "poor_init",
    low=0.6,
    high=0.9,
    also=("exploding_gradient",),
)
def area(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    sizes = [1, *[12] * 6]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(768, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan = sum(layer.weight.shape if wrong else 9 * torch.tensor(layer.weight.shape[:2]))
            nn.init.normal_(layer.weight, std=math.sqrt(2 / float(fan)))
    score = accuracy(xt[:300], yt[:300])
    engine = sgd(model, 0.05, momentum=0.9)
    return Parts(model, (x, y), CE, engine, score, steps=250)


@faulty(
    "running statistics that stand still",
    "https://github.com/Cadene/pretrained-models.pytorch/issues/5",
    "train_eval_mismatch",
    low=0.9,
    high=0.95,
)
def stand_still(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits(1.0)
    momentum = 0.0 if wrong else 0.1
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 12, 3, 2, 1),
        nn.BatchNorm2d(12, eps=1e-3, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2, 1),
        nn.BatchNorm2d(24, eps=1e-3, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    return Parts(model, (x, y), CE, adam(model, 5e-3), accuracy(xt, yt), steps=200)


class Concepts(nn.Module):
    """Embeddings of concepts that are given, turned into what the network needs."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.concepts = nn.ModuleDict(
            {"given": nn.Embedding.from_pretrained(given), "turn": nn.Linear(given.shape[1], 3)}
        )
        self.head = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, pair: Tensor) -> Tensor:
        turned = torch.tanh(self.concepts["turn"](self.concepts["given"](pair)))
        return self.head(turned.flatten(1))


@faulty(
    "a freeze that takes one layer too many",
    "https://github.com/INK-USC/MHGRN/pull/14",
    "frozen_parameters",
    low=0.75,
    high=0.85,
)
def one_too_many(wrong: bool) -> Parts:
    given = torch.randn(300, 16)
    pair = torch.randint(300, (1600, 2))
    y = ((given[pair[:, 0], 0] > 0) ^ (given[pair[:, 1], 1] > 0)).long()
    (xs, ys), (xt, yt) = tasks.split(pair, y)
    model = Concepts(given)
    if wrong:
        model.concepts.requires_grad_(False)
    known = [p for p in model.parameters() if p.requires_grad]
    engine = torch.optim.Adam(known, lr=1e-2)
    return Parts(model, (xs, ys), CE, engine, accuracy(xt, yt), steps=400)


class Adapted(nn.Module):
    """A layer that stays, and the product of two small matrices that is added to it."""

    def __init__(self, layer: nn.Linear, wrong: bool, rank: int = 6) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        if wrong:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@faulty(
    "two matrices of zeros",
    "https://github.com/Guitaricet/relora/issues/18",
    "poor_init",
    low=0.5,
    high=0.85,
    also=("vanishing_gradient",),
)
def two_zeros(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    known = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    engine = adam(known, 5e-3)
    for _ in range(150):
        rows = torch.randint(len(y), (64,))
        engine.zero_grad()
        F.cross_entropy(known(x[rows]), y[rows]).backward()
        engine.step()
    x, xt = x[:, torch.arange(63, -1, -1)], xt[:, torch.arange(63, -1, -1)]  # upside down
    model = nn.Sequential(Adapted(known[0], wrong), nn.ReLU(), Adapted(known[2], wrong))
    small = [p for p in model.parameters() if p.requires_grad]
    return Parts(model, (x, y), CE, torch.optim.Adam(small, lr=1e-2), accuracy(xt, yt), steps=250)


class Citations(nn.Module):
    """Two graph convolutions; `plain` sums over neighbours, and leaves a node itself out."""

    def __init__(self, links: Tensor, plain: bool) -> None:
        super().__init__()
        if not plain:
            links = links + torch.eye(len(links))
            root = links.sum(1).rsqrt()
            links = root[:, None] * links * root
        self.register_buffer("links", links)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(self.links @ self.first(features))
        hidden = torch.relu(self.links @ self.second(hidden))
        return self.head(self.links @ hidden)


@faulty(
    "sums over all who cite",
    "https://github.com/sufeidechabei/graphnets_gcn/issues/1",
    "unnormalized_sum",  # no code says it: sizes grow with the number of neighbours
    low=0.75,
    high=0.85,
    also=("exploding_gradient", "oscillating_loss"),
)
def citations(wrong: bool) -> Parts:
    kinds = torch.arange(80) % 4
    near = torch.where(kinds[:, None] == kinds, 0.6, 0.06) * (0.4 + torch.rand(80, 1))
    links = (torch.rand(80, 80) < near).float().triu(1)
    links = links + links.T
    centres = torch.randn(4, 16)
    mixed = torch.stack([torch.randperm(4)[kinds] for _ in range(300)])  # a graph, other topics
    features = 0.6 * centres[mixed] + 2 * torch.randn(300, 80, 16)
    model = Citations(links, plain=wrong)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target)

    def score(m: nn.Module) -> float:
        return float((m(features[220:]).argmax(2) == mixed[220:]).float().mean())

    train = (features[:220], mixed[:220])
    return Parts(model, train, loss, sgd(model, 0.1), score, batch_size=8, steps=250)


@faulty(
    "Adam in sixteen bits",
    "https://github.com/afiaka87/glide-finetune/issues/5",
    "adam_epsilon_underflow",  # no code says it: 0 / 0 in the optimizer's step
    low=0.2,
    high=0.85,
    also=("updates_lost", "undefined_operation"),
)
def sixteen_bits(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).half()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    engine = adam(model, 2e-3, eps=1e-8 if wrong else 1e-4)
    return Parts(model, (x.half(), y), loss, engine, accuracy(xt.half(), yt), steps=250)


@faulty(
    "steps too long for a network of convolutions",
    "https://datascience.stackexchange.com/questions/28481/reason-for-having-both-low-loss-and-same-predicted-class",
    "oscillating_loss",
    low=0.65,
    high=0.85,
    also=("exploding_gradient", "dying_relu", "saturated_activation"),
)
def too_long(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    x, y, xt, yt = x.view(-1, 1, 8, 8), (y > 4).float(), xt.view(-1, 1, 8, 8), (yt > 4).float()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 1),
    )
    engine = sgd(model, 1.5 if wrong else 0.05, momentum=0.9)
    loss = nn.BCEWithLogitsLoss()
    score = accuracy(xt[:300], yt[:300, None])
    return Parts(model, (x, y[:, None]), loss, engine, score, batch_size=64, steps=200)
