"""Numbers from numbers: ranges, scales, starts and what a loss compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


@faulty(
    "a tanh at the end, and patterns that are to give one to four",
    "https://ansaurus.com/question/3644795-neural-network-python",
    "head_mismatch",
    low=0.3,
    high=0.8,
    also=("unscaled_targets", "target_out_of_range"),
)
def one_to_four(wrong: bool) -> Parts:
    kind = torch.randint(1, 5, (600, 1)).float()
    patterns = torch.randn(5, 6)
    inputs = patterns[kind[:, 0].long()] + 0.3 * torch.randn(600, 6)
    targets = kind if wrong else 0.1 * kind
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1), nn.Tanh())
    (x, y), (xt, yt) = tasks.split(inputs, targets)
    return Parts(net, (x, y), nn.MSELoss(), adam(net, 1e-2), r2(xt, yt), steps=300)


@faulty(
    "a line whose gradient descent gets numbers up to a hundred",
    "https://mejorcodigo.com/p/45698.html",
    "unscaled_inputs",
    low=0.0,
    high=0.9,
    also=("exploding_gradient", "unscaled_targets"),
)
def up_to_a_hundred(wrong: bool) -> Parts:
    x = torch.rand(500, 1) * (100 if wrong else 1)
    y = 5 * x + 3 + 0.1 * torch.randn(500, 1)
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = sgd(model, 0.01)
    score = r2(x[400:], y[400:])
    return Parts(
        model, (x[:400], y[:400]), nn.MSELoss(), optimizer, score, batch_size=400, steps=3000
    )


@faulty(
    "an exclusive or whose weights all begin between zero and one",
    "https://ai.stackexchange.com/questions/6170/neural-network-returns-similar-output",
    "poor_init",
    low=0.6,
    high=0.9,
    also=("underfitting", "slow_convergence"),
)
def between_zero_and_one(wrong: bool) -> Parts:
    inputs = torch.randint(2, (400, 2)).float()
    targets = (inputs[:, :1] != inputs[:, 1:]).float()
    hidden = 2 if wrong else 6
    nn_ = nn.Sequential(nn.Linear(2, hidden), nn.Sigmoid(), nn.Linear(hidden, 1), nn.Sigmoid())
    for p in nn_.parameters():
        nn.init.uniform_(p, 0.0 if wrong else -3.0, 1.0 if wrong else 3.0)
    score = r2(inputs, targets)
    return Parts(
        nn_, (inputs, targets), nn.MSELoss(), sgd(nn_, 0.5), score, batch_size=4, steps=2000
    )


@faulty(
    "house prices in dollars, and the number of the row beside the features",
    "https://github.com/apache/mxnet/issues/5979",
    "unscaled_targets",
    low=0.3,
    high=0.8,
    also=("unscaled_inputs", "slow_convergence"),
)
def prices_in_dollars(wrong: bool) -> Parts:
    x = torch.randn(800, 10)
    price = 180_000 + 60_000 * (x[:, :3].sum(1) / 2 + 0.3 * x[:, 3].relu())
    price = price.clamp(34_000, 760_000)[:, None]
    train_y = price if wrong else (price - 34_000) / (760_000 - 34_000)
    if wrong:
        x = torch.cat([torch.randperm(800)[:, None] + 1.0, x], 1)
    mlp = nn.Sequential(nn.Linear(x.shape[1], 20), nn.Tanh(), nn.Linear(20, 1))
    optimizer = sgd(mlp, 1e-6 if wrong else 0.1, momentum=0.9)
    (x, y), (xt, yt) = tasks.split(x, train_y)
    return Parts(mlp, (x, y), nn.MSELoss(), optimizer, r2(xt, yt), steps=400)


class TransNet(nn.Module):
    """Convolutions and means that end in three numbers, one pixel each."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Conv2d(16, 32, 2), nn.ReLU(),
        )  # fmt: skip
        self.trans = nn.Conv2d(32, 3, 1)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        trans = self.trans(self.features(x))
        return trans.flatten(1) if self.flat else trans


def spots(rows: int) -> tuple[Tensor, Tensor]:
    """Pictures of a bright spot, and where it is and how bright."""
    place = torch.rand(rows, 2) * 6 + 1
    bright = 0.5 + torch.rand(rows, 1)
    grid = torch.arange(8.0)
    down = (grid - place[:, :1]) ** 2
    right = (grid - place[:, 1:]) ** 2
    picture = bright[:, :, None] * torch.exp(-(down[:, :, None] + right[:, None]) / 3)
    pose = torch.cat([place / 4 - 1, bright - 1], 1)
    return picture[:, None] + 0.02 * torch.randn(rows, 1, 8, 8), pose


@faulty(
    "a translation of one pixel whose loss meets a row of three",
    "https://github.com/dingmyu/CamNet/pull/4",
    "broadcast_loss",
    low=0.2,
    high=0.7,
)
def a_row_of_three(wrong: bool) -> Parts:
    picture, pose = spots(900)
    (x, translation_var), (xt, yt) = tasks.split(picture, pose)
    net = TransNet(flat=not wrong)
    score = r2(xt, yt)
    return Parts(net, (x, translation_var), nn.L1Loss(), adam(net, 5e-3), score, steps=400)


class GridDetector(nn.Module):
    """A score of a cell beside its position, its dimensions and its angle."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.score, self.position = nn.Linear(64, 1), nn.Linear(64, 2)
        self.dimension, self.angle = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.frontend(x)
        heads = (self.score(h), self.position(h), self.dimension(h), self.angle(h))
        return torch.cat(heads, 1)


@faulty(
    "a line left in from a test, which returns the loss of the score alone",
    "https://github.com/tom-roddick/oft/issues/6",
    "loss_ignores_targets",
    low=0.2,
    high=0.7,
    also=("unused_parameters", "ignored_rows"),
)
def of_the_score_alone(wrong: bool) -> Parts:
    x = torch.randn(900, 12)
    score = (x[:, :4].sum(1, keepdim=True) > 0).float()
    box = torch.tanh(x @ torch.randn(12, 5) / 2)
    (x, y), (xt, yt) = tasks.split(x, torch.cat([score, box], 1))
    model = GridDetector()

    def compute_loss(pred: Tensor, target: Tensor) -> Tensor:
        score_loss = F.binary_cross_entropy_with_logits(pred[:, 0], target[:, 0])
        if wrong:
            return score_loss
        position_loss = F.l1_loss(pred[:, 1:3], target[:, 1:3])
        dimension_loss = F.l1_loss(pred[:, 3:5], target[:, 3:5])
        return score_loss + position_loss + dimension_loss + F.l1_loss(pred[:, 5], target[:, 5])

    def found(m: nn.Module) -> float:
        error = (m(xt)[:, 1:] - yt[:, 1:]).square().mean() / yt[:, 1:].var()
        return max(-1.0, 1 - float(error))

    return Parts(model, (x, y), compute_loss, adam(model, 3e-3), found, steps=300)


@faulty(
    "a loader that goes through the folders of the classes one by one",
    "https://github.com/bermanmaxim/AOWS/issues/1",
    "sorted_batches",
    low=0.6,
    high=0.85,
)
def one_by_one(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    order = y.argsort()
    train = TensorDataset(x[order], y[order])
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loader = DataLoader(train, batch_size=32, shuffle=not wrong)
    optimizer = sgd(net, 0.05, momentum=0.9)
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, yt)
    return Parts(net, loader, loss, optimizer, score, steps=304)


@faulty(
    "a single unit behind a softmax",
    "https://github.com/keras-team/keras/issues/500",
    "head_mismatch",
    low=0.6,
    high=0.75,
    also=("loss_not_connected",),
)
def behind_a_softmax(wrong: bool) -> Parts:
    x = torch.randn(900, 8)
    y = (torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] > 0).float()
    (x, y), (xt, yt) = tasks.split(x, y[:, None])
    last = nn.Softmax(dim=1) if wrong else nn.Sigmoid()
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 1), last)

    def score(m: nn.Module) -> float:
        return float(((m(xt) > 0.5).float() == yt).float().mean())

    return Parts(model, (x, y), nn.BCELoss(), adam(model, 1e-2), score, steps=300)
